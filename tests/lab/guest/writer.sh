#!/bin/sh
# writer.sh start|stop DIR: a background writer of 64 KiB files with their checksums; stop ends it and compares all.
case $1 in
  start)
    rm -f /tmp/stop
    (
      i=0
      while [ ! -e /tmp/stop ]; do
        head -c 65536 /dev/urandom > /tmp/block
        cp /tmp/block "$2/$((i % 200))" && sync || { echo "write $i failed" > /tmp/writer.err; break; }
        echo "$(sha256sum < /tmp/block)" > "/tmp/sum.$((i % 200))"
        i=$((i + 1))
        echo $i > /tmp/written
      done
      touch /tmp/stopped
    ) > /dev/null 2>&1 &
    sleep 1
    [ -e /tmp/written ] ;;
  stop)
    before=$(cat /tmp/written)
    sleep 1
    after=$(cat /tmp/written)
    touch /tmp/stop
    i=0
    until [ -e /tmp/stopped ]; do i=$((i + 1)); [ $i -lt 100 ] || { echo "the writer hangs"; exit 1; }; usleep 100000; done
    [ ! -e /tmp/writer.err ] || { cat /tmp/writer.err; exit 1; }
    [ "$after" -gt "$before" ] || { echo "no write since: $before"; exit 1; }
    sync
    echo 3 > /proc/sys/vm/drop_caches
    for s in /tmp/sum.*; do
      [ "$(sha256sum < "$2/${s##*.}")" = "$(cat "$s")" ] || { echo "file ${s##*.} differs"; exit 1; }
    done
    echo "writer: $after files written, all of the last 200 as written" ;;
esac
