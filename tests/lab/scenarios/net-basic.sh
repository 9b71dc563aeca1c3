# what: one queue: pings of all sizes, TCP and UDP both ways with offloads, files with equal checksums, MTU 9000
# timeout: 240
bridge_up
VCPUS=1 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=1 VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
within "the vif is connected" 5000 state_is "$(backend_vif g)" 4
net_up g 1
pings g $DOM0_V4 1 56 64 1472 1473 4096 8972 32768 65507
gm g "ethtool -k eth0" > $CTL/offloads
for o in scatter-gather tx-checksumming generic-segmentation-offload tcp-segmentation-offload; do
  grep -q "^$o: on" $CTL/offloads || fail "ethtool says $(grep "^$o:" $CTL/offloads)"
done
server_start
for address in $DOM0_V4 $DOM0_V6; do
  iperf g "$address -t 2"
  iperf g "$address -t 2 -R"
done
iperf g "$DOM0_V4 -t 2 -u -b 10M"
iperf g "$DOM0_V4 -t 2 -u -b 10M -R"
if [ "$BACKEND" = ringback ]; then
  above "unsegmented packets from the guest" 10 "$(vif_stat g tx_gso)"
  above "unsegmented packets to the guest" 10 "$(vif_stat g rx_gso)"
  cat $CTL/stats.out
fi
file_both_ways g 8
step "MTU 9000"
must ip link set labbr mtu 9000
must ip link set "$(vif_name g)" mtu 9000
net_up g 1 9000
pings g $DOM0_V4 8972 65507
iperf g "$DOM0_V4 -t 2"
server_stop
guest_stop g
bridge_down
