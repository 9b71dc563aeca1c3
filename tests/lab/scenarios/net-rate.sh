# what: a vif's rate, by iperf3 within 5 %, four queues together, each direction, changed while it runs
# needs: ringback
# timeout: 240
bridge_up
backend_restart --set-net max_queues=4 || fail "the daemon does not start"
leaks_daemon_restarted
# 4 Mbit/s in xl's form. The limits are low enough for an emulated guest to take, and its peer to offer, twice as much on a slow machine.
VCPUS=2 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=4 VIF1=$(vif mac=00:16:3e:77:00:01,rate=500KB/s)
guest_start g
within "the vif is connected" 5000 state_is "$(backend_vif g)" 4
same "queues" 4 "$(node "/local/domain/$(xl domid g)/device/vif/0/multi-queue-num-queues")"
net_up g 1
pings g $DOM0_V4 56
server_start
# held WHAT KBIT: iperf3's receiver counted that rate. A datagram of 1400 bytes is a frame of 1442, and the rate is the frames'.
held() {
  awk -v want="$2" -v what="$1" '
    /receiver/ { for (i = 1; i <= NF; i++) if ($i == "Kbits/sec") got = $(i - 1) * 1442 / 1400 }
    END {
      printf "%s: %d kbit/s of frames, limit %d\n", what, got, want
      exit !(got > want * 0.95 && got < want * 1.05)
    }' $CTL/sum > $CTL/held || { cat $CTL/iperf.out; fail "not within 5 %: $(cat $CTL/held)"; }
  cat $CTL/held
}
limited() { # KBIT
  for direction in "" -R; do
    g g "iperf3 -f k -c $DOM0_V4 -u -l 1400 -b 3M -P 4 -O 1 -t 8 $direction" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $direction"; }
    grep SUM $CTL/iperf.out | tail -n 2 > $CTL/sum
    held "UDP on four streams ${direction:-from the guest}" "$1"
  done
}
limited 4000
must ringback set "$(xl domid g)/vif0" rate_bytes 750000
limited 6000
server_stop
guest_stop g
bridge_down
backend_restart
leaks_daemon_restarted
