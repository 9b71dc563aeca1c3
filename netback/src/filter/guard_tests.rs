use super::*;

const MAC: Mac = [0, 0x16, 0x3e, 0, 0, 1];
const OTHER: Mac = [0, 0x16, 0x3e, 0, 0, 2];
const OWN6: &str = "2001:db8::5";
const LINK6: &str = "fe80::216:3eff:fe00:1";

fn guard(mode: AntiSpoof) -> Guard {
    let addresses =
        Addresses::parse(Some("00:16:3e:0:0:1"), Some("10.0.0.5 10.1.0.0/16,2001:db8::5"));
    Guard::new(mode, &addresses.unwrap()).unwrap().unwrap()
}

fn ethernet(from: Mac, kind: u16, rest: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &from, &kind.to_be_bytes(), rest].concat()
}

fn arp(from: Mac, sender: [u8; 4]) -> Vec<u8> {
    let rest = [&ARP_OF_IPV4[..], &[0, 1], &from, &sender, &[0; 6], &[10, 0, 0, 1]].concat();
    ethernet(MAC, ETHERTYPE_ARP, &rest)
}

fn ipv4(source: [u8; 4], ports: [u8; 4]) -> Vec<u8> {
    let mut rest = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0];
    rest.extend_from_slice(&source);
    rest.extend_from_slice(&[10, 0, 0, 1]);
    rest.extend_from_slice(&ports);
    rest.extend_from_slice(&[0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    ethernet(MAC, ETHERTYPE_IPV4, &rest)
}

/// A packet whose headers behind the first begin with `next`.
fn ipv6(source: &str, next: u8, behind: &[u8]) -> Vec<u8> {
    let mut rest = vec![0x60, 0, 0, 0];
    rest.extend_from_slice(&(behind.len() as u16).to_be_bytes());
    rest.extend_from_slice(&[next, 255]);
    rest.extend_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
    rest.extend_from_slice(&Ipv6Addr::LOCALHOST.octets());
    rest.extend_from_slice(behind);
    ethernet(MAC, ETHERTYPE_IPV6, &rest)
}

/// A message about `target` with the option `link` of `mac`.
fn discovery(kind: u8, target: &str, link: u8, mac: Mac) -> Vec<u8> {
    let head = match kind {
        ROUTER_SOLICITATION => 8,
        ROUTER_ADVERTISEMENT => 16,
        _ => 24,
    };
    let mut message = vec![kind; 1];
    message.resize(head, 0);
    if head == 24 {
        message[8..].copy_from_slice(&target.parse::<Ipv6Addr>().unwrap().octets());
    }
    message.extend_from_slice(&[link, 1]);
    message.extend_from_slice(&mac);
    message
}

/// The same frame behind so many tags.
fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 7].repeat(tags), &frame[12..]].concat()
}

#[track_caller]
fn check(frame: &[u8], mac: bool, ip: bool) {
    for tags in [0, 1, 2] {
        let frame = tagged(frame, tags);
        assert_eq!(guard(AntiSpoof::Mac).permits(&frame), mac, "mac, {tags} tags");
        assert_eq!(guard(AntiSpoof::Ip).permits(&frame), ip, "ip, {tags} tags");
    }
    let hidden = tagged(frame, 3);
    assert!(!guard(AntiSpoof::Mac).permits(&hidden) && !guard(AntiSpoof::Ip).permits(&hidden));
}

#[test]
fn ethernet_and_arp() {
    check(&ethernet(OTHER, 0x88b5, &[0; 46]), false, false);
    // Other protocols show no address: with IP's they do not pass at all.
    check(&ethernet(MAC, 0x88b5, &[0; 46]), true, false);
    check(&arp(MAC, [10, 0, 0, 5]), true, true);
    check(&arp(MAC, [10, 1, 77, 3]), true, true);
    check(&arp(MAC, [0; 4]), true, true);
    check(&arp(MAC, [10, 0, 0, 1]), true, false);
    check(&arp(OTHER, [10, 0, 0, 5]), false, false);
    let mut odd = arp(MAC, [10, 0, 0, 5]);
    odd[18] = 16;
    check(&odd, false, false);
    check(&arp(MAC, [10, 0, 0, 5])[..41], false, false);
}

#[test]
fn ipv4_and_dhcp() {
    check(&ipv4([10, 0, 0, 5], [1, 2, 3, 4]), true, true);
    check(&ipv4([10, 1, 255, 255], [1, 2, 3, 4]), true, true);
    check(&ipv4([10, 2, 0, 0], [1, 2, 3, 4]), true, false);
    check(&ipv4([0; 4], DHCP), true, true);
    check(&ipv4([0; 4], [0, 67, 0, 68]), true, false);
    let mut fragment = ipv4([0; 4], DHCP);
    fragment[14 + 6] = 0x20;
    check(&fragment, true, false);
    check(&ipv4([10, 0, 0, 5], DHCP)[..33], true, false);
}

#[test]
fn ipv6_and_neighbours() {
    for (source, ip) in [(OWN6, true), (LINK6, true), ("2001:db8::6", false), ("::", false)] {
        check(&ipv6(source, 17, &[0; 8]), true, ip);
        check(&ipv6(source, ICMPV6, &[128, 0, 0, 0, 0, 0, 0, 0]), true, ip);
    }
    let of =
        |source, kind, target, link, mac| ipv6(source, ICMPV6, &discovery(kind, target, link, mac));
    let (solicit, advertise) = (NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT);
    check(&of(OWN6, solicit, "2001:db8::1", SOURCE_LINK, MAC), true, true);
    check(&of(OWN6, solicit, "2001:db8::1", SOURCE_LINK, OTHER), false, false);
    check(&of(OWN6, advertise, OWN6, TARGET_LINK, MAC), true, true);
    check(&of(OWN6, advertise, OWN6, TARGET_LINK, OTHER), false, false);
    check(&of(OWN6, advertise, "2001:db8::1", TARGET_LINK, MAC), true, false);
    // Duplicate address detection claims an address for the guest itself only.
    check(&ipv6("::", ICMPV6, &discovery(solicit, OWN6, SOURCE_LINK, MAC)[..24]), true, true);
    check(&ipv6("::", ICMPV6, &discovery(solicit, "fe80::1", 1, MAC)[..24]), true, false);
    check(&of(LINK6, ROUTER_SOLICITATION, OWN6, SOURCE_LINK, MAC), true, true);
    check(&of(LINK6, ROUTER_SOLICITATION, OWN6, SOURCE_LINK, OTHER), false, false);
    // No router.
    check(&of(LINK6, ROUTER_ADVERTISEMENT, OWN6, SOURCE_LINK, MAC), true, false);
    check(&of(LINK6, REDIRECT, OWN6, TARGET_LINK, OTHER), true, false);
    // Options that do not end where the packet does.
    let mut lame = discovery(advertise, OWN6, TARGET_LINK, MAC);
    for len in [0, 2] {
        lame[25] = len;
        check(&ipv6(OWN6, ICMPV6, &lame), false, false);
    }
}

#[test]
fn nothing_hides_behind_other_headers() {
    let wrong = discovery(NEIGHBOUR_ADVERTISEMENT, OWN6, TARGET_LINK, OTHER);
    let right = discovery(NEIGHBOUR_ADVERTISEMENT, OWN6, TARGET_LINK, MAC);
    let behind = |headers: usize, message: &[u8]| {
        let mut bytes = Vec::new();
        for number in 1..=headers {
            let next = if number == headers { ICMPV6 } else { DESTINATION };
            bytes.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]);
        }
        ipv6(OWN6, DESTINATION, &[&bytes[..], message].concat())
    };
    for headers in 1..=MAX_EXTENSIONS {
        check(&behind(headers, &right), true, true);
        check(&behind(headers, &wrong), false, false);
    }
    check(&behind(MAX_EXTENSIONS + 1, &right), false, false);
    let fragment = |offset: u16, next: u8, rest: &[u8]| {
        let [high, low] = (offset << 3 | 1).to_be_bytes();
        ipv6(OWN6, FRAGMENT, &[&[next, 0, high, low, 0, 0, 0, 9][..], rest].concat())
    };
    check(&fragment(0, ICMPV6, &right), false, false);
    check(&fragment(0, ICMPV6, &[]), false, false);
    check(&fragment(0, 17, &[0; 16]), true, true);
    check(&fragment(3, ICMPV6, &[0; 16]), true, true);
    check(&ipv6(OWN6, ROUTING, &[ICMPV6]), false, false);
    check(
        &ipv6(OWN6, AUTHENTICATION, &[&[ICMPV6, 1][..], &[0; 10], &wrong].concat()),
        false,
        false,
    );
}

#[test]
fn no_bytes_of_a_frame_make_it_panic() {
    // Every prefix of packets with headers of every kind.
    for frame in [
        arp(MAC, [10, 0, 0, 5]),
        ipv4([0; 4], DHCP),
        ipv6(OWN6, ICMPV6, &discovery(NEIGHBOUR_ADVERTISEMENT, OWN6, TARGET_LINK, MAC)),
        ipv6(OWN6, DESTINATION, &[ICMPV6, 0, 1, 4, 0, 0, 0, 0, 136, 0]),
    ] {
        for len in 0..frame.len() {
            for mode in [AntiSpoof::Mac, AntiSpoof::Ip] {
                guard(mode).permits(&frame[..len]);
            }
        }
    }
}

#[test]
fn keys_that_are_missing_or_wrong_are_named() {
    let none = Addresses::default();
    assert_eq!(Guard::new(AntiSpoof::Off, &none), Ok(None));
    assert!(Guard::new(AntiSpoof::Mac, &none).unwrap_err().contains("mac"));
    let only = Addresses::parse(Some("00:16:3e:00:00:01"), None).unwrap();
    assert!(Guard::new(AntiSpoof::Mac, &only).unwrap().is_some());
    assert!(Guard::new(AntiSpoof::Ip, &only).unwrap_err().contains("key ip"));
    for mac in ["", "1", "01:0:0:0:0:0", "0:0:0:0:0", "0:0:0:0:0:0:0", "0:0:0:0:0:100"] {
        assert!(Addresses::parse(Some(mac), None).is_err(), "{mac}");
    }
    for ip in ["10.0.0", "10.0.0.1/33", "10.0.0.1/", "::1/129", "host", "10.0.0.1/-1"] {
        assert!(Addresses::parse(None, Some(ip)).unwrap_err().contains(ip), "{ip}");
    }
    let any = Addresses::parse(Some("0:0:0:0:0:2"), Some("0.0.0.0/0 ::/0")).unwrap();
    let guard = Guard::new(AntiSpoof::Ip, &any).unwrap().unwrap();
    let mut frame = ipv4([8, 8, 8, 8], DHCP);
    frame[6..12].copy_from_slice(&[0, 0, 0, 0, 0, 2]);
    assert!(guard.permits(&frame));
}
