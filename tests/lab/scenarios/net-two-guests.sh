# what: two guests through a bridge: offloads from one to the other
# timeout: 180
bridge_up
VCPUS=1 TOOLS=net MEM=320 CMDLINE=xen_netfront.max_queues=1 VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
VIF1=$(vif mac=00:16:3e:77:00:02)
guest_start h
net_up g 1
net_up h 2
pings g "$(guest_v4 2)" 56 1473 65507
gm h "iperf3 -s -D"
iperf g "$(guest_v4 2) -t 2"
iperf g "$(guest_v4 2) -t 2 -R"
iperf g "$(guest_v6 2) -t 2"
if [ "$BACKEND" = ringback ]; then
  above "unsegmented packets from g" 10 "$(vif_stat g tx_gso)"
  above "unsegmented packets to h" 10 "$(vif_stat h rx_gso)"
fi
guest_stop g
guest_stop h
bridge_down
