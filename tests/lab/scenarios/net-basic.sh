# what: one queue: pings of all sizes, TCP and UDP both ways with offloads, files with equal checksums, MTU 9000
# timeout: 240
bridge_up
VCPUS=1 TOOLS=net MEM=384 CMDLINE=xen_netfront.max_queues=1 VIF1=$(vif mac=00:16:3e:77:00:01)
guest_start g
b=$(backend_vif g)
within "the vif is connected" 5000 state_is "$b" 4
net_up g 1
pings g $DOM0_V4 1 56 64 1472 1473 4096 8972 32768 65507
guest_stop g
bridge_down
