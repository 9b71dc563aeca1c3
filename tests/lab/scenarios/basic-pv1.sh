# what: a pv guest with 1 vCPU(s): mkfs, copy, fsck -f, features, counters, checksums
# timeout: 120
basic pv 1
