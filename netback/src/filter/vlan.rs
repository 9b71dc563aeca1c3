//! VLAN tags (IEEE 802.1Q), and a vif as an access port of one VLAN: the guest sees no tags, the
//! other side sees this VLAN's alone.

use crate::checksum::ETHERTYPE_QINQ;
use crate::checksum::ETHERTYPE_VLAN;
use crate::frame::{Checksum, Frame};

/// Bytes of a tag.
const TAG: usize = 4;
/// Where it is: behind both addresses.
const AT: usize = 12;
/// The bits of a tag that name its VLAN; the others are its priority.
const VID: u16 = 0x0fff;
/// The highest VLAN; 4095 is reserved.
pub const MAX_VLAN: u32 = 4094;

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

/// Whether there is a tag at `at`: a customer's or a service provider's.
fn is_tag(frame: &[u8], at: usize) -> bool {
    matches!(be16(frame, at), Some(ETHERTYPE_VLAN | ETHERTYPE_QINQ))
}

/// Puts a tag of the type `ethertype` into a frame; whether there was room. Where its checksum belongs
/// moves with it.
#[must_use]
pub fn push(frame: &mut Frame, ethertype: u16, control: u16) -> bool {
    let checksum = match frame.offload.checksum {
        Checksum::Blank { start, offset } => {
            let Some(start) = start.checked_add(TAG as u16) else { return false };
            Checksum::Blank { start, offset }
        }
        other => other,
    };
    if frame.len() < AT || !frame.grow_front(TAG) {
        return false;
    }
    frame.copy_within(TAG..TAG + AT, 0);
    frame[AT..AT + 2].copy_from_slice(&ethertype.to_be_bytes());
    frame[AT + 2..AT + TAG].copy_from_slice(&control.to_be_bytes());
    frame.offload.checksum = checksum;
    true
}

/// Takes the outer tag out of a frame; whether it was there, and nothing in it was to be summed.
#[must_use]
pub fn pop(frame: &mut Frame) -> bool {
    let checksum = match frame.offload.checksum {
        Checksum::Blank { start, .. } if usize::from(start) < AT + TAG => return false,
        Checksum::Blank { start, offset } => Checksum::Blank { start: start - TAG as u16, offset },
        other => other,
    };
    if !is_tag(frame, AT) || frame.len() < AT + TAG {
        return false;
    }
    frame.copy_within(..AT, TAG);
    frame.trim_front(TAG);
    frame.offload.checksum = checksum;
    true
}

/// The VLAN of a vif.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan(u16);

impl Vlan {
    /// By its number; 0 is none.
    pub fn new(number: u32) -> Option<Vlan> {
        let number = u16::try_from(number).ok()?;
        (1..=MAX_VLAN).contains(&number.into()).then_some(Vlan(number))
    }

    /// Tags a frame of the guest; `false` where it has a tag of its own. One that only gives a priority
    /// (VLAN 0) is none: it becomes this VLAN's, with its priority.
    #[must_use]
    pub fn tag(self, frame: &mut Frame) -> bool {
        if !is_tag(frame, AT) {
            return push(frame, ETHERTYPE_VLAN, self.0);
        }
        let control = be16(frame, AT + 2).filter(|control| control & VID == 0);
        let is_ours = be16(frame, AT) == Some(ETHERTYPE_VLAN) && !is_tag(frame, AT + TAG);
        let Some(control) = control.filter(|_| is_ours) else { return false };
        frame[AT + 2..AT + TAG].copy_from_slice(&(control | self.0).to_be_bytes());
        true
    }

    /// Takes this VLAN's tag from a frame for the guest; `false` where it is another's, or has a second
    /// one behind it: what goes out has none.
    #[must_use]
    pub fn untag(self, frame: &mut Frame) -> bool {
        let is_ours = be16(frame, AT) == Some(ETHERTYPE_VLAN)
            && be16(frame, AT + 2).is_some_and(|control| control & VID == self.0)
            && !is_tag(frame, AT + TAG);
        is_ours && pop(frame)
    }
}

#[cfg(test)]
#[path = "vlan_tests.rs"]
mod tests;
