//! Gives the one guest of this network its address (RFC 2131).

use smoltcp::socket::udp::{self, PacketBuffer, PacketMetadata, UdpMetadata};
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, IpAddress, IpEndpoint, Ipv4Address,
};

use super::{GATEWAY, GUEST, NETMASK};

/// Ports of server and client.
const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// Seconds that the address is the guest's; it always gets the same.
const LEASE: u32 = 86_400;
/// The option `interface MTU` (RFC 2132, 5.1).
const INTERFACE_MTU: u8 = 26;
/// Longest message that is looked at or made.
const LONGEST: usize = 1500;
/// Messages that wait.
const WAITING: usize = 8;

/// A socket bound to the server's port.
pub(super) fn socket() -> Option<udp::Socket<'static>> {
    let buffer =
        || PacketBuffer::new(vec![PacketMetadata::EMPTY; WAITING], vec![0; WAITING * LONGEST]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(SERVER).ok()?;
    Some(socket)
}

/// Answers what has come, as far as there is room.
pub(super) fn serve(socket: &mut udp::Socket<'_>, mtu: u16) {
    while socket.can_recv() && socket.can_send() {
        let mut reply = [0; LONGEST];
        let Ok((request, _)) = socket.recv() else { return };
        let Some(len) = answer(request, mtu, &mut reply) else { continue };
        let mut to: UdpMetadata = IpEndpoint::new(Ipv4Address::BROADCAST.into(), CLIENT).into();
        to.local_address = Some(IpAddress::Ipv4(GATEWAY));
        if let Err(e) = socket.send_slice(&reply[..len], to) {
            tracing::debug!("an answer of the DHCP server: {e}");
        }
    }
}

/// Makes the answer to a message; its length.
fn answer(request: &[u8], mtu: u16, reply: &mut [u8]) -> Option<usize> {
    let packet = DhcpPacket::new_checked(request).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    if request.server_identifier.is_some_and(|server| server != GATEWAY) {
        return None;
    }
    let wanted = request.requested_ip.unwrap_or(request.client_ip);
    let (kind, address) = match request.message_type {
        DhcpMessageType::Discover => (DhcpMessageType::Offer, GUEST),
        DhcpMessageType::Request if wanted == GUEST => (DhcpMessageType::Ack, GUEST),
        DhcpMessageType::Request => (DhcpMessageType::Nak, Ipv4Address::UNSPECIFIED),
        DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Address::UNSPECIFIED),
        _ => return None,
    };
    let given = kind != DhcpMessageType::Nak;
    let mtu = mtu.to_be_bytes();
    let options = [DhcpOption { kind: INTERFACE_MTU, data: &mtu }];
    let answer = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: request.client_ip,
        your_ip: address,
        server_ip: GATEWAY,
        router: given.then_some(GATEWAY),
        subnet_mask: given.then_some(NETMASK),
        relay_agent_ip: request.relay_agent_ip,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: request.client_identifier,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: (given && !address.is_unspecified()).then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if given { &options } else { &[] },
    };
    let len = answer.buffer_len();
    let reply = reply.get_mut(..len)?;
    answer.emit(&mut DhcpPacket::new_unchecked(reply)).ok()?;
    Some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::EthernetAddress;

    fn asked(
        kind: DhcpMessageType,
        wanted: Option<Ipv4Address>,
        server: Option<Ipv4Address>,
    ) -> Option<Vec<u8>> {
        let request = DhcpRepr {
            message_type: kind,
            transaction_id: 77,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, 1]),
            client_ip: Ipv4Address::UNSPECIFIED,
            your_ip: Ipv4Address::UNSPECIFIED,
            server_ip: Ipv4Address::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Address::UNSPECIFIED,
            broadcast: true,
            requested_ip: wanted,
            client_identifier: None,
            server_identifier: server,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).expect("room");
        let mut reply = [0; LONGEST];
        answer(&bytes, 9000, &mut reply).map(|len| reply[..len].to_vec())
    }

    fn told(reply: &[u8]) -> (DhcpMessageType, Ipv4Address, Option<Ipv4Address>) {
        let packet = DhcpPacket::new_checked(reply).expect("a message");
        let repr = DhcpRepr::parse(&packet).expect("a message");
        assert_eq!((repr.transaction_id, repr.server_identifier), (77, Some(GATEWAY)));
        (repr.message_type, repr.your_ip, repr.router)
    }

    #[test]
    fn the_guest_is_given_its_address_and_no_other() {
        use DhcpMessageType::{Ack, Discover, Inform, Nak, Offer, Release, Request};
        let reply = asked(Discover, None, None).expect("an offer");
        assert_eq!(told(&reply), (Offer, GUEST, Some(GATEWAY)));
        assert!(reply.windows(4).any(|w| w == [26, 2, 0x23, 0x28]), "the MTU is not told");
        let reply = asked(Request, Some(GUEST), Some(GATEWAY)).expect("an answer");
        assert_eq!(told(&reply), (Ack, GUEST, Some(GATEWAY)));
        let other = Ipv4Address::new(192, 168, 1, 7);
        let reply = asked(Request, Some(other), None).expect("an answer");
        assert_eq!(told(&reply), (Nak, Ipv4Address::UNSPECIFIED, None));
        assert_eq!(told(&asked(Inform, None, None).expect("an answer")).0, Ack);
        assert_eq!(asked(Request, Some(GUEST), Some(other)), None, "meant for another server");
        assert_eq!(asked(Release, None, Some(GATEWAY)), None);
    }

    #[test]
    fn what_is_no_message_is_not_answered() {
        let whole = asked(DhcpMessageType::Discover, None, None).expect("an offer");
        // An answer is no question, nor is a part of one.
        for bytes in [&whole[..], &[], &whole[..100], &whole[..241]] {
            assert_eq!(answer(bytes, 1500, &mut [0; LONGEST]), None);
        }
    }
}
