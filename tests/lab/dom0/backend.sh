# The backend under test: ringback's daemon, or (BACKEND=kernel) xen-blkback, which shows that a scenario itself works.

backend_install() {
  mkdir -p /etc/xen/scripts /var/log/xen
  case $BACKEND in
    kernel)
      cp /lab/block-kernel /etc/xen/scripts/block-ringback
      # The stock scripts serve the kernel's vifs.
      ln -sf vif-bridge /etc/xen/scripts/vif-ringback
      modprobe xen-blkback
      modprobe xen-netback
      ;;
    ringback)
      cp /lab/block-ringback /lab/vif-ringback /etc/xen/scripts/
      chmod 755 /etc/xen/scripts/vif-ringback
      ln -sf /lab/bin/ringback /usr/sbin/ringback
      ringback version || { echo "LAB FAIL ringback does not run"; return 1; }
      ;;
  esac
  chmod 755 /etc/xen/scripts/block-ringback
}
# backend_start [ARGUMENT...]: arguments of `ringback daemon`. RINGBACK_BIN=/lab/faults/ringback is the build that can be
# told to leak by RINGBACK_TEST_LEAK.
backend_start() {
  [ "$BACKEND" = ringback ] || return 0
  NO_COLOR=1 RINGBACK_LOG=${RINGBACK_LOG:-info} setsid "${RINGBACK_BIN:-/lab/bin/ringback}" daemon "$@" >> $CTL/daemon.log 2>&1 < /dev/null &
  echo $! > $CTL/daemon.pid
  # ready when it says so; what it holds then is what the leak checks compare with
  i=0
  until tail -n 1 $CTL/daemon.log | grep -q 'serving block and network devices'; do
    i=$((i + 1))
    [ $i -le 200 ] && kill -0 "$(cat $CTL/daemon.pid)" 2> /dev/null || return 1
    usleep 50000
  done
  usleep 200000
}
backend_stop() {
  [ "$BACKEND" = ringback ] || return 0
  p=$(cat $CTL/daemon.pid)
  kill "$p" 2> /dev/null
  i=0
  while kill -0 "$p" 2> /dev/null; do
    i=$((i + 1))
    [ $i -le 60 ] || { echo "the daemon does not end at SIGTERM"; kill -9 "$p"; return 1; }
    usleep 50000
  done
}
backend_restart() { # [ARGUMENT...]: also after a scenario that failed
  [ "$BACKEND" = ringback ] || return 0
  backend_stop
  killall -9 ringback 2> /dev/null
  backend_start "$@"
}
# backend_pids [DOMID [blk|net]]: the backend processes of a kind, or those that serve a guest
backend_pids() {
  for p in $(pidof ringback); do
    c=$(tr '\0' ' ' < "/proc/$p/cmdline" 2> /dev/null)
    case "$c" in
      *" backend ${2:-blk} "*"--domid ${1:+$1 }"*) echo "$p" ;;
    esac
  done
}
# backend_report: after a failure, what each backend process is doing, with its counters
backend_report() {
  [ "$BACKEND" = ringback ] || return 0
  ringback list
  ringback stats | grep -vE ' 0 [a-z]+$'
  for p in $(pidof ringback); do
    for t in /proc/$p/task/*; do
      echo "$p $(cat $t/comm) $(cat $t/wchan) $(awk '/ctxt/ { printf "%s ", $2 }' $t/status)"
    done
  done
}
