# The words that scenarios are written in (sourced, busybox sh): guests, disks, the backend.
# A failed check calls `fail`, which ends the scenario.

CTL=/run/lab
BACKEND_VBD=/local/domain/0/backend/vbd

# busybox's shell prefers its own applets to programs of the same name; these are Debian's.
losetup() { /usr/sbin/losetup "$@"; }
blockdev() { /usr/sbin/blockdev "$@"; }

step() { echo "--- $(cut -d" " -f1 /proc/uptime) $*"; echo "LAB step ${SCENARIO:-} $*" > /dev/console; }
fail() { echo "FAIL: $*"; echo "$*" > $CTL/failed; exit 1; }
must() { "$@" || fail "status $? of: $*"; }
# same WHAT WANTED GOT
same() { [ "$2" = "$3" ] && echo "ok: $1: $3" || fail "$1: wanted '$2', got '$3'"; }
# above WHAT LIMIT GOT: an integer above the limit
above() { [ "${3:-0}" -gt "$2" ] 2> /dev/null && echo "ok: $1: $3 > $2" || fail "$1: wanted above $2, got '$3'"; }
# within WHAT MILLISECONDS COMMAND...: polls until the command succeeds. The limits are those of a machine with nothing else
# to do: where it is slower (see `slowness`), they grow with it.
within() {
  what=$1; limit=$(scaled "$2"); shift 2
  t0=$(ms)
  until "$@" > /dev/null 2>&1; do
    [ $(($(ms) - t0)) -le "$limit" ] || fail "$what: not within $limit ms"
    usleep 20000
  done
  echo "ok: $what after $(($(ms) - t0)) ms (limit $limit)"
}
# in_time WHAT MILLISECONDS TAKEN
in_time() {
  [ "$3" -le "$(scaled "$2")" ] || fail "$1 took $3 ms, the limit is $(scaled "$2")"
  echo "ok: $1 after $3 ms (limit $(scaled "$2"))"
}
# slowness: how much slower than alone on two cores this machine is now, in percent (at least 100): five `xl list`
XL_LIST_MS=90
slowness() {
  s0=$(ms)
  for i in 1 2 3 4 5; do xl list > /dev/null; done
  percent=$((($(ms) - s0) * 20 / XL_LIST_MS))
  [ $percent -gt 100 ] || percent=100
  [ $percent -le 2000 ] || percent=2000
  echo $percent
}
slowness_again() { # before what is timed closely: the larger of then and now
  again=$(slowness)
  [ "$again" -le "$(cat $CTL/slowness)" ] || echo "$again" > $CTL/slowness
}
scaled() { echo $(($1 * $(cat $CTL/slowness 2> /dev/null || echo 100) / 100)); }
ms() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }
gone() { ! "$@"; }

# --- disks

# image NAME MiB: a sparse image on the scratch disk; prints its path
image() { rm -f "/scratch/$1.img"; truncate -s "$2M" "/scratch/$1.img"; echo "/scratch/$1.img"; }
# disk VDEV FORMAT:TARGET [ACCESS]: an xl disk line. With BACKEND=kernel the script of the same name serves the same target.
disk() { echo "format=raw,script=block-ringback,vdev=$1,access=${3:-rw},target=$2"; }
sha() { sha256sum "$1" | cut -d' ' -f1; }

# --- guests

# guest_start NAME: boots a guest and waits until it takes commands. Variables:
#   TYPE=pv|pvh  VCPUS=1  MEM=448  TOOLS=base|fio|net  CMDLINE=...  DISK1.. DISK4 (lines as printed by `disk`)  VIF1, VIF2
# blkfront allocates all the pages that its rings can name beforehand: with 16-page rings and 32 segments 64 MiB a queue, and
# with 256 segments 512 MiB, or it is out of memory.
guest_config() {
  ramdisk=domu.cpio; mem=${MEM:-448}
  case ${TOOLS:-base} in
    fio) ramdisk=domu-fio.cpio; mem=${MEM:-640} ;;
    net) ramdisk=domu-net.cpio ;;
  esac
  vifs=
  for v in "${VIF1:-}" "${VIF2:-}"; do
    [ -z "$v" ] || vifs="$vifs \"$v\","
  done
  disks=
  for d in "${DISK1:-}" "${DISK2:-}" "${DISK3:-}" "${DISK4:-}"; do
    [ -z "$d" ] || disks="$disks \"$d\","
  done
  # tsc_mode: a PVH guest crashes at an RDTSCP otherwise
  cat << CFG
name = "$1"
type = "${TYPE:-pv}"
kernel = "/scratch/vmlinux"
ramdisk = "/scratch/$ramdisk"
extra = "console=hvc0 quiet ${CMDLINE:-}"
memory = $mem
vcpus = ${VCPUS:-1}
tsc_mode = "native"
vif = [ $vifs ]
disk = [ $disks ]
on_poweroff = "destroy"
on_reboot = "${ON_REBOOT:-restart}"
on_crash = "destroy"
CFG
}
guest_start() {
  guest_config "$1" > $CTL/$1.cfg
  guest_create "$1" xl create $CTL/$1.cfg
}
# guest_create NAME COMMAND...: runs the command (xl create or restore) and waits for the guest's agent
guest_create() {
  name=$1; shift
  step "start $name"
  touch $CTL/guest-$name.log
  seen=$(wc -l < $CTL/guest-$name.log)
  "$@" || fail "$* ended with status $?"
  guest_ready "$name" "$seen" "$(scaled 40000)"
}
# guest_ready NAME LINES MS: waits for the agent's hello after that many lines of its console
guest_ready() {
  t0=$(ms)
  until tail -n +$(($2 + 1)) $CTL/guest-$1.log | grep -q '^@ready@'; do
    [ $(($(ms) - t0)) -le "$3" ] || fail "guest $1 did not start within $3 ms"
    usleep 50000
  done
  guest_tty "$1"
  step "$1 is ready, domid $(xl domid "$1")"
}
guest_tty() { # NAME: the console's tty changes with the domid
  id=$(xl domid "$1")
  xenstore-read "/local/domain/$id/console/tty" > $CTL/$1.tty
}
# g NAME COMMAND [SECONDS]: a command in the guest; its output and its status
g() {
  g_send "$1" "$2"
  g_wait "$1" "$G_ID" "${3:-60}"
}
# g_send NAME COMMAND: starts a command and does not wait; its id is in $G_ID
g_send() {
  G_ID=$(($(cat $CTL/seq 2> /dev/null || echo 100) + 1))
  echo $G_ID > $CTL/seq
  printf '%s %s\n' $G_ID "$2" > "$(cat $CTL/$1.tty)"
}
g_wait() { # NAME ID SECONDS
  w_end=$(($(ms) + $(scaled "$3") * 1000))
  until grep -q "^@$2@ " $CTL/guest-$1.log; do
    [ "$(ms)" -le $w_end ] || { echo "guest $1: no answer within $3 s"; return 124; }
    usleep 30000
  done
  awk -v id="$2" '
    { sub(/\r$/, "") }
    index($0, "@" id "@ ") == 1 { rc = $2; exit }
    on && !($0 == "" ) { print }
    $0 == "@" id "<" { on = 1 }
    END { exit rc }' $CTL/guest-$1.log
}
# gm NAME COMMAND [SECONDS]: a command that must succeed
gm() {
  echo "[$1]# $2"
  g "$@" || fail "in guest $1: status $? of: $2"
}
domain_gone() { no_node "/local/domain/$1"; }
disks_closed() { # DOMID: each of its backend nodes is closed or gone
  for n in $(xenstore-list "$BACKEND_VBD/$1" 2> /dev/null); do
    case $(node "$BACKEND_VBD/$1/$n/state") in 6 | "") ;; *) return 1 ;; esac
  done
}
# guest_stop NAME: a clean power-off from inside; its disks are closed and the domain is off within 1 s. What the toolstack
# does after the disks are closed takes its own time on a busy machine, so there the second limit is wider.
guest_stop() {
  step "power off $1"
  id=$(xl domid "$1")
  g "$1" "sync" > /dev/null
  slowness_again
  off=1000
  [ "$(cat $CTL/slowness)" -le 120 ] || off=3000
  # The toolstack runs a vif's hotplug script twice before it lets the domain go
  [ -z "$(xenstore-list "/local/domain/$id/device/vif" 2> /dev/null)" ] || off=10000
  g_send "$1" "poweroff -f"
  within "$1's disks are closed" 1000 disks_closed "$id"
  within "$1 is off" $off domain_gone "$id"
  guest_never_waited "$1"
}
guest_never_waited() {
  ! grep -q 'timeout closing device' $CTL/guest-$1.log || fail "the guest $1 waited for its backend"
}
guest_destroy() {
  step "destroy $1"
  id=$(xl domid "$1")
  slowness_again
  t0=$(ms)
  xl destroy "$1" 2>&1 | tee $CTL/destroy.out
  t1=$(($(ms) - t0))
  ! grep -qi error $CTL/destroy.out || fail "xl destroy complained: $(grep -i error $CTL/destroy.out | head -n 1)"
  in_time "xl destroy" 2000 $t1
  within "domain $id is gone" 1000 domain_gone "$id"
}
guests_cleanup() { # after a scenario: whatever still runs, given a moment to end by itself
  i=0
  while [ $i -lt 10 ] && [ -n "$(xl list | awk 'NR > 1 && $2 != 0')" ]; do i=$((i + 1)); usleep 100000; done
  for d in $(xl list | awk 'NR > 1 && $2 != 0 { print $2 }'); do
    echo "cleanup: destroying domain $d"
    xl destroy "$d"
  done
  rm -f $CTL/*.cfg $CTL/*.tty /scratch/*.save
  for f in /scratch/*.img; do rm -f "$f"; done
}

# --- xenstore nodes of a guest's disk
vdev_id() { # xvda -> 51712
  case $1 in
    xvda) echo 51712 ;; xvdb) echo 51728 ;; xvdc) echo 51744 ;; xvdd) echo 51760 ;;
    hdc) echo 5632 ;; *) fail "unknown vdev $1" ;;
  esac
}
backend_node() { echo "$BACKEND_VBD/$(xl domid "$1")/$(vdev_id "$2")"; }
frontend_node() { echo "/local/domain/$(xl domid "$1")/device/vbd/$(vdev_id "$2")"; }
node() { xenstore-read "$1" 2> /dev/null; }
state_is() { [ "$(node "$1/state")" = "$2" ]; }
no_node() { xenstore-exists "$1"; [ $? = 1 ]; } # any other status is an error of the tool and not an answer

. /lab/backend.sh
. /lab/net.sh
