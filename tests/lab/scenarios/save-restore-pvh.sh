# what: xl save and restore of a pvh guest with a mounted, busy file system
# timeout: 150
save_restore pvh
