# what: two guests through Open vSwitch, by the kernel's datapath and by the one in user space
# needs: ringback
# timeout: 360
. /lab/openvswitch.sh
modprobe tun || fail "no tun in dom0's kernel"
[ -c /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }
VCPUS=1 TOOLS=net MEM=256 CMDLINE=xen_netfront.max_queues=1
for datapath in system netdev; do
  ovs_up $datapath
  if [ $datapath = netdev ]; then
    # It reads devices by AF_PACKET without the words that say what is left to do to a packet.
    backend_restart --set-net offloads=here || fail "the daemon does not start"
    leaks_daemon_restarted
  fi
  VIF1=$(ovs_vif mac=00:16:3e:77:00:01)
  guest_start g
  VIF1=$(ovs_vif mac=00:16:3e:77:00:02)
  guest_start h
  net_up g 1
  net_up h 2
  # Not larger: while it learns a flow Open vSwitch drops what comes in a burst, and many fragments are one.
  pings g "$(guest_v4 2)" 56 1473
  pings g $DOM0_V4 56 1473
  gm h "iperf3 -s -D"
  iperf g "$(guest_v4 2) -t 2"
  iperf g "$(guest_v4 2) -t 2 -R"
  iperf g "$(guest_v6 2) -t 2"
  must ovs-vsctl show
  for guest in g h; do
    ovs-vsctl list-ports ovsbr | grep -qx "$(vif_name $guest)" || fail "the vif of $guest is no port of the bridge"
  done
  guest_stop g
  guest_stop h
  same "ports left on the bridge" "" "$(ovs-vsctl list-ports ovsbr)"
  ovs_down $datapath
done
backend_restart
leaks_daemon_restarted
