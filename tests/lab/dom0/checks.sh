# What several scenarios check (sourced).

# same_bytes GUEST VDEV PATH: the guest's checksum of the whole disk is dom0's checksum of the image
same_bytes() {
  in_guest=$(g "$1" "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/$2" 120 | grep -oE '^[0-9a-f]{64}')
  sync
  echo 3 > /proc/sys/vm/drop_caches
  in_dom0=$(sha256sum < "$3" | cut -d' ' -f1)
  [ ${#in_guest} = 64 ] || fail "no checksum from the guest"
  same "checksum of $2" "$in_dom0" "$in_guest"
}

# image_bytes GUEST VDEV: notes the guest's checksum of the whole disk, to be compared when nobody serves the image
image_bytes() {
  g "$1" "sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/$2" 120 | grep -oE '^[0-9a-f]{64}' > $CTL/guest.sha
  [ -s $CTL/guest.sha ] || fail "no checksum from the guest"
}
# image_equals_guest FORMAT PATH: two programs read of the image what the guest read of its disk
image_equals_guest() {
  must ringback disk convert -f "$1" -O raw "$2" /scratch/ours.img
  same "the image's bytes, by ringback" "$(cat $CTL/guest.sha)" "$(sha /scratch/ours.img)"
  # QEMU does not know parents of VHDs.
  if [ "$1" = qcow2 ]; then
    must qemu-img convert -f "$1" -O raw "$2" /scratch/theirs.img
    same "the image's bytes, by qemu-img" "$(cat $CTL/guest.sha)" "$(sha /scratch/theirs.img)"
  fi
  rm -f /scratch/ours.img /scratch/theirs.img
}
# image_checks FORMAT PATH: the image is clean, by each program that knows its format
image_checks() {
  must ringback disk check -f "$1" "$2"
  [ "$1" != qcow2 ] || must qemu-img check -f qcow2 "$2"
}

# fs_round GUEST DEV: a file system made, filled, unmounted, compared after a remount, and checked
fs_round() {
  gm "$1" "sh /lab/fs.sh $2 ${3:-12}" 90 > $CTL/fs.out
  cat $CTL/fs.out
  grep -q '^FS clean$' $CTL/fs.out || fail "the file system on $2 is not clean"
}

# features GUEST VDEV VCPUS: what an unmodified frontend says of the disk, and what the store says of the connection
features() {
  gm "$1" "dmesg | grep blkfront.*$2" > $CTL/features.out
  cat $CTL/features.out
  grep -q "$2: flush diskcache: enabled; persistent grants: enabled; indirect descriptors: enabled" $CTL/features.out \
    || fail "the frontend's log does not say flush, persistent grants and indirect descriptors enabled"
  same "queues of $2" "$3" "$(g "$1" "ls /sys/block/$2/mq | wc -l" | tail -n 1)"
  same "tags of queue 0" 512 "$(g "$1" "cat /sys/block/$2/mq/0/nr_tags" | tail -n 1)"
  above "discard_max_bytes" 0 "$(g "$1" "cat /sys/block/$2/queue/discard_max_bytes" | tail -n 1)"
  f=$(frontend_node "$1" "$2")
  same "ring-page-order" 4 "$(node "$f/ring-page-order")"
  [ "$3" = 1 ] || same "multi-queue-num-queues" "$3" "$(node "$f/multi-queue-num-queues")"
}

# The frontend's own options for large rings and requests
BLKFRONT="xen_blkfront.max_ring_page_order=4"

# basic TYPE VCPUS: the round that every kind of guest makes
basic() {
  img=$(image disk 128)
  TYPE=$1 VCPUS=$2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
  guest_start g
  features g xvda "$2"
  fs_round g /dev/xvda
  counters_agree g xvda "$2"
  same_bytes g xvda "$img"
  guest_stop g
  must e2fsck -fn "$img"
}

# fio_round TYPE VCPUS
fio_round() {
  img=$(image disk 64)
  TYPE=$1 VCPUS=$2 TOOLS=fio CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
  guest_start g
  for job in rand4k-d1 rand4k-d32 seq64k-d32 seq1m-d1 mixed-d32 trim-d32; do
    step "fio $job"
    gm g "sh /lab/fio.sh $job /dev/xvda" 60
  done
  same_bytes g xvda "$img"
  guest_stop g
}

# stat_each GUEST VDEV COUNTER: a counter of each of the disk's queues, on one line
stat_each() {
  ringback stats --device "$(xl domid "$1")/$2" > $CTL/stats.out || fail "ringback stats ended with status $?"
  awk -v k="$3" '$1 == k { printf "%s ", $2 }' $CTL/stats.out
}
# stat_sum GUEST VDEV COUNTER: the same, summed
stat_sum() { stat_each "$@" | awk '{ for (i = 1; i <= NF; i++) n += $i; print NF ? n : "none" }'; }
# counters_agree GUEST VDEV QUEUES: our counters after a file system's work
counters_agree() {
  [ "$BACKEND" = ringback ] || return 0
  n=0
  for r in $(stat_each "$1" "$2" requests); do
    above "requests of queue $n" 0 "$r"
    n=$((n + 1))
  done
  same "queues with a counter" "$3" "$n"
  above "persistent hits above misses" "$(stat_sum "$1" "$2" misses)" "$(stat_sum "$1" "$2" hits)"
  above "indirect requests" 0 "$(stat_sum "$1" "$2" indirect)"
  cat $CTL/stats.out
}

# save_restore TYPE: a guest writes to a mounted file system, is saved and restored, and goes on writing
save_restore() {
  img=$(image disk 64)
  TYPE=$1 VCPUS=2 MEM=320 CMDLINE= DISK1=$(disk xvda "raw:$img")
  guest_start g
  gm g "mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && sh /lab/writer.sh start /mnt"
  old=$(xl domid g)
  step "save"
  must xl save g /scratch/g.save
  within "domain $old is gone" 1000 domain_gone "$old"
  step "restore"
  must xl restore /scratch/g.save
  guest_tty g
  within "the guest answers" 10000 g g true
  gm g "sleep 1; sh /lab/writer.sh stop /mnt"
  gm g "umount /mnt && e2fsck -fn /dev/xvda"
  same_bytes g xvda "$img"
  guest_never_waited g
  guest_stop g
}

# leak_control KIND: with RINGBACK_TEST_LEAK=KIND a disk that is detached leaves one of the kind, and leaks_after says so
leak_control() {
  mkdir -p $CTL/outer && cp $CTL/*.before $CTL/outer/
  backend_stop
  RINGBACK_BIN=/lab/faults/ringback RINGBACK_TEST_LEAK=$1 backend_start || fail "the daemon does not start"
  img=$(image disk 32)
  second=$(image second 32)
  CMDLINE= DISK1=$(disk xvda "raw:$img")
  guest_start g
  id=$(xl domid g)
  leaks_before
  must xl block-attach g "$(disk xvdb "raw:$second")"
  within "xvdb in the guest" 5000 g g "test -b /dev/xvdb"
  gm g "dd if=/dev/zero of=/dev/xvdb bs=64k count=16 oflag=direct 2>/dev/null"
  must xl block-detach g xvdb
  leaks_after 1500 && fail "a leaked $1 was not found"
  case $1 in
    grant) sign='^active grants: ' ;;
    port) sign='^port: ' ;;
    node) sign='^store node: ' ;;
  esac
  grep -q "$sign" $CTL/leaks || fail "the leak was not named as a $1: $(head -n 1 $CTL/leaks)"
  echo "ok: found: $(grep "$sign" $CTL/leaks | head -n 1)"
  guests_cleanup
  backend_restart || fail "the daemon does not start"
  cp $CTL/outer/*.before $CTL/
  leaks_daemon_restarted
  # the nodes left on purpose, also those of the first disk
  [ "$1" != node ] || xenstore-rm "$BACKEND_VBD/$id"
  true
}

# --- backends that are killed

# kills_begin DOMID: names the guest whose backend is to be killed, and the seed of when. What happens is read off the daemon's
# log: on two cores that a guest's fio keeps busy each program that is started takes its time.
kills_begin() {
  KILLED=$1
  echo "${SEED:-20231}" > $CTL/random
}
# random N: a number below N, by the seed
random() {
  seed=$((($(cat $CTL/random) * 1103515245 + 12345) % 2147483648))
  echo $seed > $CTL/random
  echo $((seed / 65536 % $1))
}
attached() { grep -c ': attached with ' $CTL/daemon.log; }
# backend_kill: kill -9 of the guest's backend process
backend_kill() {
  attached > $CTL/attached
  must kill -9 "$(sed -n "s/.*blk: process \([0-9]*\) serves domain $KILLED\$/\1/p" $CTL/daemon.log | tail -n 1)"
}
# backend_serves: another process serves the guest's disk
backend_serves() { [ "$(attached)" -gt "$(cat $CTL/attached)" ]; }
# replays: how many requests were served again, by the daemon's log
replays() { sed -n 's/.* queue(s), \([0-9]*\) request(s) are served again.*/\1/p' $CTL/daemon.log | awk '{ n += $1 } END { print n + 0 }'; }
# running GUEST: fio of verify.sh is at work
running() { g "$1" "test ! -e /tmp/stopped && test ! -e /tmp/wrong" > /dev/null; }
# each_queue_served GUEST VDEV QUEUES: the present backend has had requests on each
each_queue_served() {
  [ "$(stat_each "$1" "$2" requests | awk '{ for (i = 1; i <= NF; i++) n += $i > 0; print n + 0, NF }')" = "$3 $3" ]
}
# guest_log_is_clean GUEST: its kernel has seen no error of a disk
guest_log_is_clean() {
  g "$1" "dmesg | grep -iE 'I/O error|xvd.*(fail|error)|vbd.*(error|fail)|blkfront.*(bad|error)|hung task'" > $CTL/guest.errors
  [ ! -s $CTL/guest.errors ] || fail "the guest's log: $(head -n 1 $CTL/guest.errors)"
  echo "ok: no error in the log of $1"
}
