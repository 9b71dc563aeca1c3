# what: negative control: a backend that leaks a port on purpose is found
# needs: ringback
# timeout: 120
leak_control port
