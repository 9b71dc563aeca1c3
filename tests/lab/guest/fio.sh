#!/bin/sh
# fio.sh JOB DEV: a verified fio job by name. crc32c in each block's header, checked when the whole range is written.
job=$1; dev=$2
run() {
  fio --name="$job" --filename="$dev" --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_dump=0 \
    --randrepeat=1 --group_reporting --output-format=terse --terse-version=3 "$@" > /tmp/fio.out 2>&1
  rc=$?
  grep -E 'verify|error|fio:' /tmp/fio.out
  # terse fields: 6 = KiB read, 47 = KiB written
  grep '^3;' /tmp/fio.out | awk -F';' '{ print "FIO " $3 " error=" $5 " read_KiB=" $6 " written_KiB=" $47 }'
  grep '^3;' /tmp/fio.out | awk -F';' '$5 != 0 || $47 == 0 { exit 1 } END { if (!NR) exit 1 }' || rc=1
  return $rc
}
case $job in
  rand4k-d1) run --rw=randwrite --bs=4k --iodepth=1 --size=4M --fsync=64 ;;
  rand4k-d32) run --rw=randwrite --bs=4k --iodepth=32 --size=16M --fsync=256 ;;
  seq64k-d32) run --rw=write --bs=64k --iodepth=32 --size=32M ;;
  seq1m-d1) run --rw=write --bs=1M --iodepth=1 --size=48M --fsync=8 ;;
  seq1m-d32) run --rw=write --bs=1M --iodepth=32 --size=48M ;;
  mixed-d32) run --rw=randrw --bsrange=4k-1M --bs_unaligned=0 --blockalign=4k --iodepth=32 --size=32M --fsync=64 ;;
  trim-d32) run --rw=randtrimwrite --bs=64k --iodepth=32 --size=16M ;;
  # verify-only: what an earlier seq64k-d32 wrote; for the negative control, which spoils a block in between
  verify-only) run --rw=write --bs=64k --iodepth=32 --size=32M --verify_only ;;
  *) echo "unknown job $job"; exit 2 ;;
esac
