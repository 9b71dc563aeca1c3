# what: a vif's rate, by iperf3 within 5 %, four queues together, each direction, changed while it runs
# needs: ringback
# timeout: 240
bridge_up
backend_restart --set-net max_queues=4 || fail "the daemon does not start"
leaks_daemon_restarted
# 8 Mbit/s in xl's form
VCPUS=2 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=4 VIF1=$(vif mac=00:16:3e:77:00:01,rate=1000KB/s)
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
    }' $CTL/iperf.out || { cat $CTL/iperf.out; fail "$1: not within 5 % of $2 kbit/s"; }
}
limited() { # KBIT
  for direction in "" -R; do
    g g "iperf3 -f k -c $DOM0_V4 -u -l 1400 -b 5M -P 4 -O 1 -t 8 $direction" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $direction"; }
    grep SUM $CTL/iperf.out | tail -n 2 > $CTL/sum && mv $CTL/sum $CTL/iperf.out
    held "UDP on four streams ${direction:-from the guest}" "$1"
  done
}
limited 8000
must ringback set "$(xl domid g)/vif0" rate_bytes 1500000
limited 12000
server_stop
guest_stop g
bridge_down
backend_restart
leaks_daemon_restarted
