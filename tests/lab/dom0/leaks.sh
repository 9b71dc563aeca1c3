# What must not be left behind: grants, ports, processes, descriptors, threads, mappings, zombies, store nodes.
# leaks_before takes the state that leaks_after compares with; each leak is a line in /run/lab/leaks.

# Ports of dom0 without the columns that may change by themselves (VCPU)
ports() { lsevtchn 0 2> /dev/null | sed 's/VCPU *[0-9]*: *//' | sort; }
# All store paths; the empty folders that libxl keeps once it has made any guest are no leak
store_paths() {
  xenstore-ls -f / 2> /dev/null | sed 's/ = .*//' \
    | grep -vxE '/libxl|/vm|/local/domain/0/(backend|backend/vbd|backend/console|device-model)' | sort
}
# Active grants by domain, from Xen's own tables: lines "domid count"
grant_report() {
  xl dmesg -c > /dev/null
  xl debug-keys g
  xl dmesg | tr -d '\r' > $CTL/grants.txt
}
# active_grants DOMID: the active entries of that domain (a PV guest's console and store pages are granted but not active)
active_grants() {
  grant_report
  awk -v d="$1" '
    /grant-table for remote d/ || /grant-table for remote domain/ {
      match($0, /d(omain)? ?[0-9]+/); s = substr($0, RSTART, RLENGTH); gsub(/[^0-9]/, "", s); on = (s == d) }
    on && /^\(XEN\) \[0x?[0-9a-f]+\]/ { n++ }
    END { print n + 0 }' $CTL/grants.txt
}
# Domains other than dom0 that Xen's grant tables know at all
granting_domains() {
  grant_report
  sed -nE 's/.*grant-table for remote d(omain)? ?([0-9]+).*/\2/p' $CTL/grants.txt | grep -vx 0 | tr '\n' ' '
}
# One line a process of ours: what it is, threads, descriptors, gntdev mappings
processes() {
  for p in $(pidof ringback); do
    [ -d "/proc/$p/fd" ] || continue
    c=$(tr '\0' ' ' < "/proc/$p/cmdline" 2> /dev/null)
    echo "$p [$c] threads=$(ls "/proc/$p/task" | wc -l) fds=$(ls "/proc/$p/fd" | wc -l) gntdev=$(grep -c gntdev "/proc/$p/maps")"
  done | sort
}

leaks_before() {
  ports > $CTL/ports.before
  store_paths > $CTL/store.before
  processes > $CTL/processes.before
}
# A scenario that restarted the daemon says so: the new process is the one to compare with
leaks_daemon_restarted() { processes > $CTL/processes.before; }

leaks_look() {
  : > $CTL/leaks
  xl list | awk 'NR > 1 && $2 != 0 { print "zombie or running domain: " $0 }' >> $CTL/leaks
  for d in $(granting_domains); do echo "grant table of domain $d with $(active_grants "$d") active" >> $CTL/leaks; done
  ports > $CTL/ports.after
  diff $CTL/ports.before $CTL/ports.after | sed -n 's/^[+-] *\([^+-].*\)/port: \1/p' >> $CTL/leaks
  store_paths > $CTL/store.after
  diff $CTL/store.before $CTL/store.after | sed -n 's/^\([+-]\)\(\/.*\)/store node: \1\2/p' >> $CTL/leaks
  processes > $CTL/processes.after
  diff $CTL/processes.before $CTL/processes.after | sed -n 's/^\([+-]\)\([0-9].*\)/process: \1\2/p' >> $CTL/leaks
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
