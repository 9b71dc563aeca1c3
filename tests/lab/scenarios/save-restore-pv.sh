# what: xl save and restore of a pv guest with a mounted, busy file system
# timeout: 150
save_restore pv
