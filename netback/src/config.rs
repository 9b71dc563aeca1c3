//! The knobs of a network backend.

use crate::filter::guard::AntiSpoof;
use crate::filter::vlan::MAX_VLAN;
use crate::limit::Rate;

/// Most queues that can be asked for.
pub const MAX_QUEUES: u32 = 64;

/// Most pages of a ring that can be asked for, as an order.
pub const MAX_RING_PAGE_ORDER: u32 = 4;

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
    /// How closely the guest's addresses are watched.
    pub antispoof: AntiSpoof,
    /// The VLAN that the vif is in; 0 is none, and tags pass as they are.
    pub vlan: u32,
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
            antispoof: AntiSpoof::Off,
            vlan: 0,
        }
    }
}

impl Config {
    /// Sets the knob `name`.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let rate = match name {
            "rate_bytes" => Some(&mut self.rate.bytes),
            "rate_packets" => Some(&mut self.rate.packets),
            _ => None,
        };
        if let Some(rate) = rate {
            *rate = value.parse().map_err(|_| format!("{name}={value}: a number a second"))?;
            return Ok(());
        }
        if name == "antispoof" {
            self.antispoof = match value {
                "off" => AntiSpoof::Off,
                "mac" => AntiSpoof::Mac,
                "ip" => AntiSpoof::Ip,
                _ => return Err(format!("{name}={value}: off, mac or ip")),
            };
            return Ok(());
        }
        let (place, low, high) = match name {
            "max_queues" => (&mut self.max_queues, 1, MAX_QUEUES),
            "max_ring_page_order" => (&mut self.max_ring_page_order, 0, MAX_RING_PAGE_ORDER),
            "poll_us" => (&mut self.poll_us, 0, 1_000_000),
            "rx_stall_s" => (&mut self.rx_stall_s, 1, 3600),
            "vlan" => (&mut self.vlan, 0, MAX_VLAN),
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

#[cfg(test)]
mod tests {
    use perf::Block;

    use super::*;

    /// The columns of the page's table of these knobs.
    fn rows() -> Vec<Vec<&'static str>> {
        let page = include_str!("../../docs/tuning.md");
        let (_, table) = page.split_once("| network knob |").expect("the table");
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        rows.map(|row| row.split('|').map(str::trim).skip(1).collect()).collect()
    }

    #[test]
    fn the_page_about_tuning_says_what_the_code_does() {
        let rows = rows();
        assert_eq!(rows.len(), 8);
        let known = |name: &str| {
            let fields = [crate::QueueCounters::FIELDS, rings::RingCounters::FIELDS];
            fields.iter().any(|fields| fields.iter().any(|field| field.name == name))
        };
        for row in rows {
            let (name, default) = (row[0], row[2]);
            let mut config = Config::default();
            if default != "CPUs" {
                config.set(name, default).expect("its default");
            }
            assert_eq!(config, Config::default(), "{name}");
            for counter in row[6].split([',', ' ']).filter(|word| word.contains('_')) {
                assert!(known(counter), "{name} shows in {counter}, which no counter is called");
            }
        }
    }

    #[test]
    fn values_without_a_meaning_are_refused() {
        for list in ["vlan=4095", "vlan=-1", "antispoof=yes", "poll_us=1000001", "speed=1", "vlan"]
        {
            assert!(Config::default().set_all(list).is_err(), "{list}");
        }
        let mut config = Config::default();
        config.set_all("vlan=7,antispoof=ip").expect("two knobs");
        assert_eq!((config.vlan, config.antispoof), (7, AntiSpoof::Ip));
    }
}
