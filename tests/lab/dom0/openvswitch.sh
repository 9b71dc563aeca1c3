# Open vSwitch in dom0 (sourced by the scenarios that need it): its database, its switch, one bridge.

OVS_RUN=/var/run/openvswitch

# ovs_up DATAPATH: netdev is the one in user space, system the kernel's. The bridge is ovsbr, with dom0's addresses.
ovs_up() {
  trap ovs_end EXIT # of a scenario that fails: its bridge has the addresses of the next one's
  mkdir -p /etc/openvswitch $OVS_RUN /var/log/openvswitch
  [ "$1" = netdev ] || modprobe openvswitch || fail "dom0's kernel has no openvswitch"
  rm -f /scratch/ovs.db
  must ovsdb-tool create /scratch/ovs.db /usr/share/openvswitch/vswitch.ovsschema
  must ovsdb-server /scratch/ovs.db --remote=punix:$OVS_RUN/db.sock --detach --pidfile --log-file=$CTL/ovsdb.log
  must ovs-vsctl --no-wait init
  must ovs-vswitchd --detach --pidfile --log-file=$CTL/ovs.log
  must ovs-vsctl add-br ovsbr -- set bridge ovsbr datapath_type="$1"
  must ip addr add $DOM0_V4/24 dev ovsbr
  must ip -6 addr add $DOM0_V6/64 dev ovsbr nodad
  must ip link set ovsbr up
  # libxl hands its environment to hotplug scripts, and ours calls this one
  export RINGBACK_VIF_SCRIPT=vif-openvswitch
}
ovs_end() {
  ovs-appctl -t ovs-vswitchd exit --cleanup
  ovs-appctl -t ovsdb-server exit
}
ovs_down() { # DATAPATH
  must ovs-vsctl del-br ovsbr
  ovs_end
  within "Open vSwitch has ended" 3000 gone pidof ovs-vswitchd
  [ "$1" = netdev ] || rmmod openvswitch
  unset RINGBACK_VIF_SCRIPT
  trap - EXIT
}
# ovs_vif [KEYS]: an xl vif line on the bridge
ovs_vif() { echo "script=vif-ringback,bridge=ovsbr${1:+,$1}"; }
