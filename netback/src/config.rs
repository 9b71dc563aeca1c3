//! The knobs of a network backend.

use crate::limit::Rate;

/// Most queues that can be asked for.
pub const MAX_QUEUES: u32 = 64;

/// Most pages of a ring that can be asked for, as an order.
pub const MAX_RING_PAGE_ORDER: u32 = 4;

/// Whether a vif's link is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Packets pass.
    Up,
    /// They are dropped, both ways, and the guest is told (`carrier` is 0).
    Down,
}

/// How a network backend serves its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Most queues offered.
    pub max_queues: u32,
    /// Most pages of each ring that are offered, as an order. Only frontends that know of it, as
    /// ours, have more than one page.
    pub max_ring_page_order: u32,
    /// Microseconds that a queue polls before it sleeps.
    pub poll_us: u32,
    /// Seconds after which frames that wait for a guest's pages are dropped.
    pub rx_stall_s: u32,
    /// How much a vif may move each way.
    pub rate: Rate,
    /// The link.
    pub carrier: Carrier,
}

impl Default for Config {
    fn default() -> Config {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Config {
            max_queues: cpus.min(MAX_QUEUES),
            max_ring_page_order: MAX_RING_PAGE_ORDER,
            poll_us: 0,
            rx_stall_s: 10,
            rate: Rate::default(),
            carrier: Carrier::Up,
        }
    }
}

impl Config {
    /// Sets the knob `name`.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        if name == "carrier" {
            self.carrier = match value {
                "up" => Carrier::Up,
                "down" => Carrier::Down,
                _ => return Err(format!("carrier={value}: up or down")),
            };
            return Ok(());
        }
        let rate = match name {
            "rate_bytes" => Some(&mut self.rate.bytes),
            "rate_packets" => Some(&mut self.rate.packets),
            _ => None,
        };
        if let Some(rate) = rate {
            *rate = value.parse().map_err(|_| format!("{name}={value}: a number a second"))?;
            return Ok(());
        }
        let (place, low, high) = match name {
            "max_queues" => (&mut self.max_queues, 1, MAX_QUEUES),
            "max_ring_page_order" => (&mut self.max_ring_page_order, 0, MAX_RING_PAGE_ORDER),
            "poll_us" => (&mut self.poll_us, 0, 1_000_000),
            "rx_stall_s" => (&mut self.rx_stall_s, 1, 3600),
            _ => return Err(format!("there is no knob {name}")),
        };
        let number = value.parse().ok().filter(|n| (low..=high).contains(n));
        *place = number.ok_or_else(|| format!("{name}={value}: {low} to {high}"))?;
        Ok(())
    }

    /// Sets knobs from a list `NAME=VALUE,...`.
    pub fn set_all(&mut self, list: &str) -> Result<(), String> {
        for pair in list.split(',').filter(|pair| !pair.is_empty()) {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| format!("{pair}: not NAME=VALUE"))?;
            self.set(name.trim(), value.trim())?;
        }
        Ok(())
    }
}
