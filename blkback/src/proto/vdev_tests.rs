use proptest::prelude::*;

use super::Vdev;

#[test]
fn the_table_of_vbd_interface() {
    for (name, number) in [
        ("xvda", 51712),
        ("xvda1", 51713),
        ("xvdb", 51728),
        ("xvdb1", 51729),
        ("xvdp15", 51967),
        ("xvda16", (1 << 28) | 16),
        ("xvdq", (1 << 28) | 16 << 8),
        ("xvdtq37", (1 << 28) | 536 << 8 | 37),
        ("sda", 2048),
        ("sdb3", 2067),
        ("sdp15", 2303),
        ("hda", 768),
        ("hda1", 769),
        ("hdb", 832),
        ("hdc", 5632),
        ("hdd63", 5759),
    ] {
        assert_eq!(Vdev::parse(name), Some(Vdev(number)), "{name}");
        assert_eq!(Vdev(number).name().as_deref(), Some(name), "{number}");
        assert_eq!(Vdev(number).to_string(), name);
        assert_eq!(Vdev::parse(&number.to_string()), Some(Vdev(number)));
    }
}

#[test]
fn other_spellings() {
    for (name, number) in
        [("d0", 51712), ("d0p0", 51712), ("d1p2", 51730), ("d536p37", (1 << 28) | 536 << 8 | 37)]
    {
        assert_eq!(Vdev::parse(name), Some(Vdev(number)), "{name}");
    }
    assert_eq!(Vdev::parse("5"), Some(Vdev(5)));
    assert_eq!(Vdev(5).name(), None);
    assert_eq!(Vdev(5).to_string(), "5");
    assert_eq!(Vdev(3 << 8 | 2 << 6).name(), None, "no third disk on the first channel");
}

#[test]
fn nonsense() {
    for name in [
        "",
        "xvd",
        "xvd1",
        "xvdA",
        "xvda01",
        "xvda0",
        "xvda256",
        "xvda-1",
        "sdq",
        "sda16",
        "hde",
        "hda64",
        "d",
        "dp1",
        "d1p",
        "d1p256",
        "d1048576",
        "d01",
        "2147483648",
        "+5",
        " 5",
        "vda",
        "xvdzzzzzzzzzzzz",
        "xvda1x",
        "xvdé",
    ] {
        assert_eq!(Vdev::parse(name), None, "{name:?}");
    }
}

proptest! {
    #[test]
    fn both_ways(disk in 0u32..1 << 20, partition in 0u32..256) {
        let v = Vdev::parse(&format!("d{disk}p{partition}")).unwrap();
        prop_assert_eq!(Vdev::parse(&v.name().unwrap()), Some(v));
    }

    #[test]
    fn any_text_and_any_number(text in "\\PC{0,8}", number: u32) {
        if let Some(v) = Vdev::parse(&text) && let Some(name) = v.name() {
            prop_assert_eq!(Vdev::parse(&name), Some(v));
        }
        // Some numbers are second spellings of a device; their name still means one of them.
        if let Some(name) = Vdev(number).name() {
            prop_assert_eq!(Vdev::parse(&name).unwrap().name(), Some(name));
        }
    }
}
