# what: kill -9 of the backend under iperf3: the link stays, the transfer goes on
# needs: ringback
# timeout: 180
bridge_up
VCPUS=1 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=1 VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
within "the vif is connected" 5000 state_is "$(backend_vif g)" 4
net_up g 1
pings g $DOM0_V4 56
changes() { g g "cat /sys/class/net/eth0/carrier_changes" | tail -n 1; }
before=$(changes)
server_start
for direction in "" -R; do
  step "kill under iperf3 $direction"
  g_send g "iperf3 -f m -i 1 -t 10 -c $DOM0_V4 $direction"
  id=$G_ID
  sleep 4
  old=$(backend_pids "$(xl domid g)" net)
  [ -n "$old" ] || fail "no backend process for the guest"
  must kill -9 $old
  another() { p=$(backend_pids "$(xl domid g)" net); [ -n "$p" ] && [ "$p" != "$old" ]; }
  within "another backend process" 3000 another
  g_wait g "$id" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 $direction did not end well"; }
  grep -E 'sec' $CTL/iperf.out
  silent=$(grep -cE ' 0.00 (Bytes|MBytes) ' $CTL/iperf.out)
  [ "$silent" -le "$(scaled 2)" ] || fail "$silent seconds without a byte"
done
same "carrier changes" "$before" "$(changes)"
pings g $DOM0_V4 56 65507
server_stop
guest_stop g
bridge_down
