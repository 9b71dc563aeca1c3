# what: xl network-detach and network-attach while the guest goes on
# timeout: 180
bridge_up
VCPUS=1 TOOLS=net MEM=384 CMDLINE= VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
net_up g 1
pings g $DOM0_V4 56
for round in 1 2; do
  node_b=$(backend_vif g)
  must xl network-detach g 0
  within "no eth0 in the guest" 3000 g g "test ! -e /sys/class/net/eth0"
  same "backend node" "" "$(node "$node_b/state")"
  within "no device of the vif" 1000 test ! -e "/sys/class/net/$(vif_name g)"
  must xl network-attach g script=vif-ringback bridge=labbr mac=00:16:3e:77:00:01
  within "eth0 in the guest" 5000 g g "test -e /sys/class/net/eth0"
  within "the vif is connected" 3000 state_is "$(backend_vif g)" 4
  net_up g 1
  pings g $DOM0_V4 56 65507
done
guest_stop g
bridge_down
