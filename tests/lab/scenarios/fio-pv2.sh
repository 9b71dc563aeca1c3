# what: Debian's fio with verify=crc32c in a PV guest with 2 vCPUs
# timeout: 240
fio_round pv 2
