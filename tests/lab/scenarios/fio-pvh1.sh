# what: Debian's fio with verify=crc32c in a PVH guest with 1 vCPU
# timeout: 240
fio_round pvh 1
