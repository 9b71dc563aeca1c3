# what: kill -9 of the backend under fio with verify, 32 requests deep on each of 2 queues, eight times and until enough was cut off; the guest notices nothing
# needs: ringback
# timeout: 240
# So that there is always something in flight.
backend_restart --set delay_us=20000-60000
leaks_daemon_restarted
img=$(image disk 64)
TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
id=$(xl domid g)
gm g "sh /lab/verify.sh start /dev/xvda '--iodepth=32 --numjobs=2 --offset_increment=8M --cpus_allowed=0,1 --cpus_allowed_policy=split'"
kills_begin "$id"
kill=0
# Some of the kills come between two of fio's rounds, with nothing in flight.
until [ $kill -ge 8 ] && [ "$(replays)" -gt 64 ] || [ $kill -ge 24 ]; do
  kill=$((kill + 1))
  usleep $((300000 + $(random 1500) * 1000))
  running g || fail "fio has ended before kill $kill"
  backend_kill
  within "a backend after kill $kill" 20000 backend_serves
done
above "requests that were served again" 64 "$(replays)"
within "requests on each queue after the last kill" 15000 each_queue_served g xvda 2
gm g "sh /lab/verify.sh stop /dev/xvda" 120 > $CTL/verify.out
cat $CTL/verify.out
above "verified rounds" 0 "$(sed -n 's/^verified: \([0-9]*\) .*/\1/p' $CTL/verify.out)"
echo "requests on pages that a killed process has spoilt: $(stat_sum g xvda bounced)"
guest_log_is_clean g
same_bytes g xvda "$img"
guest_stop g
run_dir_is_empty() { [ -z "$(ls "/run/ringback/$id" 2> /dev/null)" ]; }
within "nothing is left in the run directory" 3000 run_dir_is_empty
backend_restart
leaks_daemon_restarted
