use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::*;

/// A channel whose driver is the other end of a socket pair: what it sends is read as ports,
/// what it receives was written to unmask.
fn channel() -> (Evtchn, UnixDatagram) {
    let (here, driver) = UnixDatagram::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    driver.set_nonblocking(true).unwrap();
    (Evtchn { device: OwnedFd::from(here).into(), port: 5 }, driver)
}

fn unmasked(driver: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = [0; 256];
    driver.recv(&mut bytes).ok().map(|n| bytes[..n].to_vec())
}

#[test]
fn nothing_pending() {
    let (channel, driver) = channel();
    assert!(!channel.acknowledge().unwrap());
    assert_eq!(unmasked(&driver), None);
    assert_eq!(channel.port(), 5);
}

#[test]
fn an_event_is_taken_once_and_unmasked() {
    let (channel, driver) = channel();
    driver.send(&5u32.to_ne_bytes()).unwrap();
    assert!(channel.acknowledge().unwrap());
    assert_eq!(unmasked(&driver), Some(5u32.to_ne_bytes().to_vec()));
    assert!(!channel.acknowledge().unwrap());
    assert_eq!(unmasked(&driver), None);
}

#[test]
fn without_the_driver_every_call_fails() {
    let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
    let channel = Evtchn { device: null(), port: 1 };
    let errors = [
        channel.notify().err(),
        Evtchn::bind_interdomain(null(), 1, 2).err(),
        Evtchn::alloc_unbound(null(), 1).err(),
    ];
    for error in errors {
        assert_eq!(error.and_then(|e| e.raw_os_error()), Some(25), "ENOTTY");
    }
}
