#!/bin/sh
# verify.sh start DEV [FIO OPTIONS] | stop DEV: fio in the background that writes a part of DEV and verifies it with crc32c, round after round; stop
# ends it after the round that it is in, and fails unless every round was right and at least one began after `start`.
case $1 in
  start)
    rm -f /tmp/stop /tmp/stopped
    echo 0 > /tmp/rounds
    (
      n=0
      while [ ! -e /tmp/stop ]; do
        # The start; the second half stays what it was, on images below.
        fio --name=v --filename="$2" --rw=randwrite --bsrange=4k-64k --blockalign=4k --iodepth=16 --size=8M --ioengine=libaio \
          --direct=1 --fsync=200 --randseed=$n --verify=crc32c --verify_fatal=1 $3 > /tmp/fio.out 2>&1 || { touch /tmp/wrong; break; }
        n=$((n + 1))
        echo $n > /tmp/rounds
      done
      touch /tmp/stopped
    ) > /dev/null 2>&1 & ;;
  stop)
    touch /tmp/stop
    i=0
    until [ -e /tmp/stopped ]; do i=$((i + 1)); [ $i -lt 600 ] || { echo "fio hangs"; exit 1; }; usleep 100000; done
    [ ! -e /tmp/wrong ] || { cat /tmp/fio.out; exit 1; }
    echo "verified: $(cat /tmp/rounds) rounds" ;;
esac
