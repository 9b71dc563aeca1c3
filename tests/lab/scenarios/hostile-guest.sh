# what: hostile frontends in a Xen guest (gntalloc, evtchn): bad and revoked references, a corrupt index, an event storm
# needs: ringback
# timeout: 150
bad=$(image bad 32)
good=$(image good 32)
VCPUS=2 CMDLINE=
guest_start g
gm g "modprobe -r xen-blkfront; modprobe -a xen-evtchn xen-gntalloc && chmod 755 /lab/hostile_guest"
domid=$(xl domid g)
attack() { # KIND
  step "$1"
  must xl block-attach g "$(disk xvdb "raw:$bad")"
  must xl block-attach g "$(disk xvdc "raw:$good")"
  xenstore-rm "error/backend/vbd/$domid/51728" 2> /dev/null
  gm g "/lab/hostile_guest $1 51728 51744" 90 > $CTL/hostile.out
  cat $CTL/hostile.out
  grep -q "^HOSTILE $1: as it should be" $CTL/hostile.out || fail "$1: not as it should be"
  above "reads of the other device meanwhile" 0 "$(sed -n 's/.*be; \([0-9]*\) reads.*/\1/p' $CTL/hostile.out)"
  if [ "$1" = corrupt-index ]; then
    e=$(xenstore-read "error/backend/vbd/$domid/51728/error")
    case $e in
      *"req_prod"*) echo "ok: $e" ;;
      *) fail "error node of the device: '$e'" ;;
    esac
    xenstore-rm /local/domain/0/error # as the kernel's, it stays for the administrator to read
  fi
  must xl block-detach g xvdb
  must xl block-detach g xvdc
}
for kind in bad-reference revoked-reference storm corrupt-index; do attack $kind; done
guest_stop g
