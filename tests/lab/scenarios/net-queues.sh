# what: four queues: each carries packets, nothing is lost
# timeout: 180
bridge_up
[ "$BACKEND" != ringback ] || backend_restart --set-net max_queues=4 || fail "the daemon does not start"
[ "$BACKEND" != kernel ] || echo 4 > /sys/module/xen_netback/parameters/max_queues
leaks_daemon_restarted
VCPUS=2 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=4 VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
within "the vif is connected" 5000 state_is "$(backend_vif g)" 4
same "queues" 4 "$(node "/local/domain/$(xl domid g)/device/vif/0/multi-queue-num-queues")"
net_up g 1
pings g $DOM0_V4 56 65507
server_start
iperf g "$DOM0_V4 -t 3 -P 8"
iperf g "$DOM0_V4 -t 3 -P 8 -R"
if [ "$BACKEND" = ringback ]; then
  for n in $(vif_stat_each g tx_packets); do above "packets from a queue" 0 "$n"; done
  for n in $(vif_stat_each g rx_packets); do above "packets to a queue" 0 "$n"; done
fi
server_stop
guest_stop g
bridge_down
[ "$BACKEND" != ringback ] || backend_restart
leaks_daemon_restarted
