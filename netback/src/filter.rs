//! What a vif lets through: the guest's own addresses only ([`guard`]), one VLAN ([`vlan`]). A stage
//! of the queue, so that it holds for every endpoint. Pure.

pub mod guard;
pub mod vlan;

use crate::config::Config;
use crate::frame::Frame;
use guard::{Addresses, Guard};
use vlan::Vlan;

/// Why a frame of the guest goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It speaks for another address than the guest's.
    Spoofed,
    /// It has a VLAN tag of its own, or there is no room for one.
    Vlan,
}

/// The filters of one vif.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    guard: Option<Guard>,
    vlan: Option<Vlan>,
}

impl Filter {
    /// As the knobs say, for a guest with these addresses. The error names what is missing.
    pub fn new(config: &Config, addresses: &Addresses) -> Result<Filter, String> {
        Ok(Filter { guard: Guard::new(config.antispoof, addresses)?, vlan: Vlan::new(config.vlan) })
    }

    /// Whether everything passes as it is.
    pub fn is_off(&self) -> bool {
        self.guard.is_none() && self.vlan.is_none()
    }

    /// Looks at a frame of the guest, and tags it.
    pub fn from_guest(&self, frame: &mut Frame) -> Result<(), Refused> {
        if self.guard.as_ref().is_some_and(|guard| !guard.permits(frame)) {
            return Err(Refused::Spoofed);
        }
        match self.vlan {
            Some(vlan) if !vlan.tag(frame) => Err(Refused::Vlan),
            _ => Ok(()),
        }
    }

    /// Looks at a frame for the guest, and takes its tag away; whether it is the guest's.
    pub fn to_guest(&self, frame: &mut Frame) -> bool {
        self.vlan.is_none_or(|vlan| vlan.untag(frame))
    }
}
