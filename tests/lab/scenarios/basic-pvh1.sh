# what: a pvh guest with 1 vCPU(s): mkfs, copy, fsck -f, features, counters, checksums
# timeout: 120
basic pvh 1
