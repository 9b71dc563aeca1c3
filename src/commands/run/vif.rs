//! The vifs of a run: `[[vif]]` in guest.toml, what a guest does through each, what it reports.

use hypervisor::store::Client;
use hypervisor::xenbus::toolstack;
use hypervisor::xenbus::{DeviceId, Key};
use serde::{Deserialize, Serialize};

use super::super::Result;
use super::plan::VifPlan;

/// Longest payload of a ping: an IPv4 packet of 65535 bytes.
const LONGEST_PING: u32 = 65_507;

/// What a vif connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Connects {
    /// A network in the backend's process.
    User,
}

/// `[[vif]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VifSettings {
    /// Made from the vif's number if it is not said.
    pub mac: Option<String>,
    pub endpoint: Connects,
    pub queues: u32,
    pub ring_page_order: u32,
    /// Longest packet without its Ethernet header.
    pub mtu: u16,
    /// Payloads of the pings, in bytes.
    pub ping_sizes: Vec<u32>,
    /// Pings of each size.
    pub pings: u32,
    pub download_mib: u64,
    pub upload_mib: u64,
}

impl Default for VifSettings {
    fn default() -> Self {
        VifSettings {
            mac: None,
            endpoint: Connects::User,
            queues: 2,
            ring_page_order: 0,
            mtu: 1500,
            ping_sizes: vec![56, 1472, 1473, 9000, LONGEST_PING],
            pings: 10,
            download_mib: 32,
            upload_mib: 32,
        }
    }
}

impl VifSettings {
    pub fn check(&self) -> Result<()> {
        let within = |name: &str, value: u64, low: u64, high: u64| match value {
            value if (low..=high).contains(&value) => Ok(()),
            value => Err(format!("{name} is {value}; it must be {low} to {high}")),
        };
        if let Some(mac) = &self.mac {
            parse_mac(mac)
                .ok_or_else(|| format!("mac is {mac:?}; it must be like 00:16:3e:0:0:1"))?;
        }
        within("queues", self.queues.into(), 1, 64)?;
        within("ring_page_order", self.ring_page_order.into(), 0, 4)?;
        within("mtu", self.mtu.into(), 1280, 65_535)?;
        within("pings", self.pings.into(), 0, 10_000)?;
        within("download_mib", self.download_mib, 0, 1 << 20)?;
        within("upload_mib", self.upload_mib, 0, 1 << 20)?;
        for size in &self.ping_sizes {
            within("ping_sizes", (*size).into(), 0, LONGEST_PING.into())?;
        }
        Ok(())
    }

    fn mac(&self, number: u32) -> [u8; 6] {
        let [.., a, b] = number.to_be_bytes();
        // Xen's own prefix.
        self.mac.as_deref().and_then(parse_mac).unwrap_or([0, 0x16, 0x3e, 0x52, a, b])
    }

    /// What the guest has to do with the vif `number`.
    pub fn plan(&self, number: u32, seed: u64) -> VifPlan {
        VifPlan {
            devid: number,
            mac: self.mac(number),
            queues: self.queues,
            ring_page_order: self.ring_page_order,
            ping_sizes: self.ping_sizes.clone(),
            pings: self.pings,
            download: self.download_mib << 20,
            upload: self.upload_mib << 20,
            seed,
        }
    }

    /// Makes its nodes.
    pub fn attach(&self, store: &Client, domid: u16, number: u32) -> Result<()> {
        let key = |name: &str, value: &str| -> Key { (name.to_owned(), value.to_owned()) };
        let mac = self.mac(number).map(|byte| format!("{byte:02x}")).join(":");
        let (handle, mtu) = (number.to_string(), self.mtu.to_string());
        let Connects::User = self.endpoint;
        let device = toolstack::Device {
            id: DeviceId { kind: "vif", domid, devid: number },
            backend: 0,
            backend_keys: vec![
                key("script", netback::SCRIPT),
                key("type", "user"),
                key("handle", &handle),
                key("mac", &mac),
                key("mtu", &mtu),
                key("options", &format!("max_queues={}", self.queues)),
                key("hotplug-status", "connected"),
            ],
            frontend_keys: vec![key("handle", &handle), key("mac", &mac), key("mtu", &mtu)],
        };
        Ok(toolstack::attach(store, &device)?)
    }
}

/// Six bytes in hexadecimal, with colons between; not a group's address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let parts: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let mac: [u8; 6] = parts?.try_into().ok()?;
    (mac[0] & 1 == 0).then_some(mac)
}
