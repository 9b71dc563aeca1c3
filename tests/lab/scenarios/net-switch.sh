# what: two guests through a switch in the backend's process, which copies from guest to guest in one step
# needs: ringback
# timeout: 240
backend_restart --net-processes one || fail "the daemon does not start"
leaks_daemon_restarted
VCPUS=1 TOOLS=net MEM=320 CMDLINE=xen_netfront.max_queues=1
VIF1=script=vif-ringback,bridge=switch:lab,mac=00:16:3e:77:00:01
guest_start g
VIF1=script=vif-ringback,bridge=switch:lab,mac=00:16:3e:77:00:02
guest_start h
net_up g 1
net_up h 2
pings g "$(guest_v4 2)" 56 1473 65507
gm h "iperf3 -s -D"
iperf g "$(guest_v4 2) -t 2"
iperf g "$(guest_v4 2) -t 2 -R"
iperf g "$(guest_v6 2) -t 2"
gm g "head -c 33554432 /dev/urandom > /tmp/f && sha256sum < /tmp/f" 60 > $CTL/file.sha
want=$(grep -oE '^[0-9a-f]{64}' $CTL/file.sha)
# Who only reads has an input without an end (net.sh says why).
gm h "mkfifo /tmp/endless; (nc -l -p 7001 0<> /tmp/endless > /tmp/got; sha256sum < /tmp/got > /tmp/got.sha) > /dev/null 2>&1 &"
usleep 500000
gm g "nc $(guest_v4 2) 7001 < /tmp/f" 60
got() { g h "cat /tmp/got.sha" > $CTL/got.sha && grep -q "$want" $CTL/got.sha; }
within "a file from guest to guest has the same checksum" 5000 got
for guest in g h; do
  for counter in tx_gso rx_gso tx_crossed rx_crossed; do
    above "$counter of $guest" 10 "$(vif_stat $guest $counter)"
  done
  same "packets of $guest that were lost" 0 "$(vif_stat $guest rx_dropped_copy)"
done
step "kill under iperf3"
g_send g "iperf3 -f m -i 1 -t 8 -c $(guest_v4 2)"
id=$G_ID
sleep 3
old=$(pgrep -f "backend net" | head -n 1)
must kill -9 "$old"
g_wait g "$id" 60 > $CTL/iperf.out || { cat $CTL/iperf.out; fail "iperf3 did not end well"; }
grep -E 'sec' $CTL/iperf.out
pings g "$(guest_v4 2)" 56 65507
above "packets that crossed after the kill" 10 "$(vif_stat g tx_crossed)"
guest_stop g
guest_stop h
backend_restart
leaks_daemon_restarted
