# What must not be left behind: grants, ports, processes, descriptors, threads, mappings, zombies, store nodes.
# leaks_before takes the state that leaks_after compares with; each leak is a line in /run/lab/leaks.

# Ports of dom0 without the columns that may change by themselves (VCPU)
ports() { lsevtchn 0 2> /dev/null | sed 's/VCPU *[0-9]*: *//' | sort; }
# All store paths; the empty folders that libxl keeps once it has made any guest are no leak
store_paths() {
  xenstore-ls -f / 2> /dev/null | sed 's/ = .*//' \
    | grep -vxE '/libxl|/vm|/local/domain/0/(backend|backend/vbd|backend/vif|backend/console|device-model)' | sort
}
# Xen's log so far goes to a file, so that what comes next is known to be new
xen_log() { xl dmesg -c | tr -d '\r' >> $CTL/xen.log; }
grant_report() { # Xen's own grant tables
  xen_log
  xl debug-keys g
  xl dmesg -c | tr -d '\r' > $CTL/grants.txt
}
# One line a domain other than dom0: its id and its active grants
granting_domains() {
  grant_report
  awk '
    /grant-table for remote d/ { if (id != "") print id, n; match($0, /d[0-9]+/); id = substr($0, RSTART + 1, RLENGTH - 1); n = 0 }
    /^\(XEN\) *\[ *(0x)?[0-9a-f]+\] / { n++ }
    END { if (id != "") print id, n }' $CTL/grants.txt | grep -v '^0 '
}
domains() { xl list | awk 'NR > 1 && $2 != 0 { print $1, $2 }'; }
# One line a process of ours: pid, threads, descriptors, gntdev mappings, what it is
processes() {
  for p in $(pidof ringback); do
    [ -d "/proc/$p/fd" ] || continue
    c=$(tr '\0' ' ' < "/proc/$p/cmdline" 2> /dev/null)
    echo "$p $(ls "/proc/$p/task" | wc -l) $(ls "/proc/$p/fd" | wc -l) $(grep -c gntdev "/proc/$p/maps") $c"
  done | sort
}

# The host's network devices: a vif's goes with its vif
network_devices() { ls /sys/class/net; }

# leaks_before: what leaks_after compares with. Called with no guest, or with one that goes on (then the comparison is of
# what one of its disks left behind).
leaks_before() {
  domains > $CTL/domains.before
  granting_domains > $CTL/granting.before
  ports > $CTL/ports.before
  store_paths > $CTL/store.before
  processes > $CTL/processes.before
  network_devices > $CTL/devices.before
}
# A scenario that restarted the daemon says so: the new process is the one to compare with
leaks_daemon_restarted() { processes > $CTL/processes.before; }

# new_lines WHAT KIND: lines that are there now and were not before
new_lines() {
  diff $CTL/$2.before $CTL/$2.after | sed -n "s/^+\([^+].*\)/$1: \1/p" >> $CTL/leaks
}
leaks_look() {
  : > $CTL/leaks
  domains > $CTL/domains.after
  new_lines "domain or zombie" domains
  granting_domains > $CTL/granting.after
  # more active grants than before; fewer is no leak (a frontend's own pool shrinks)
  awk 'FILENAME == ARGV[1] { had[$1] = $2; next } !($1 in had) || $2 > had[$1] { print "active grants: domain " $1 " has " $2 ", before " had[$1] + 0 }' \
    $CTL/granting.before $CTL/granting.after >> $CTL/leaks
  ports > $CTL/ports.after
  new_lines port ports
  store_paths > $CTL/store.after
  new_lines "store node" store
  network_devices > $CTL/devices.after
  new_lines "network device" devices
  processes > $CTL/processes.after
  # a new process, or more of anything in an old one
  awk 'FILENAME == ARGV[1] { seen[$1] = 1; t[$1] = $2; f[$1] = $3; g[$1] = $4; next }
    !($1 in seen) { print "process: new: " $0; next }
    $2 > t[$1] { print "process: " $1 " has " $2 " threads, before " t[$1] }
    $3 > f[$1] { print "process: " $1 " has " $3 " descriptors, before " f[$1] }
    $4 > g[$1] { print "process: " $1 " has " $4 " gntdev mappings, before " g[$1] }' \
    $CTL/processes.before $CTL/processes.after >> $CTL/leaks
  [ ! -s $CTL/leaks ]
}
# leaks_after [MS]: what is still there after that time (3 s) is a leak
leaks_after() {
  end=$(($(ms) + ${1:-3000}))
  until leaks_look; do
    if [ "$(ms)" -gt $end ]; then echo "LEFT BEHIND:"; cat $CTL/leaks; return 1; fi
    usleep 200000
  done
  echo "ok: no domain, grant, port, store node, process, descriptor or thread left"
}
