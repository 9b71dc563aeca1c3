//! What a vif's queue counts beside its rings. `tx` is from the guest, `rx` to it, as the guest and
//! the kernel's xen-netback name them.

perf::counters! {
    /// One queue of a network backend.
    pub struct QueueCounters {
        /// Packets from the guest.
        tx_packets: Counter [packets],
        /// Their bytes.
        tx_bytes: Counter [bytes],
        /// Slots that they took.
        tx_slots: Counter [slots],
        /// Those of them that were unsegmented.
        tx_gso: Counter [packets],
        /// Those of them with a blank checksum.
        tx_csum_blank: Counter [packets],
        /// Packets from the guest that went no further: nonsense in them.
        tx_dropped_bad: Counter [packets],
        /// ... a page could not be read.
        tx_dropped_copy: Counter [packets],
        /// ... a checksum or segmentation was asked for that cannot be done.
        tx_dropped_offload: Counter [packets],
        /// ... they speak for an address that is not the guest's (`antispoof`).
        tx_dropped_spoofed: Counter [packets],
        /// ... they have a VLAN tag of the guest's own (`vlan`).
        tx_dropped_vlan: Counter [packets],
        /// ... they were held and not released (`drop-output`).
        tx_dropped_held: Counter [packets],
        /// ... what the vif connects to would not have them.
        tx_dropped_host: Counter [packets],
        /// ... the link is down.
        tx_dropped_link: Counter [packets],
        /// Packets from the guest that are held now (`hold-output`).
        tx_held: Gauge [packets],
        /// Grant copies' calls for packets from the guest.
        tx_batches: Counter [calls],
        /// Slots whose bytes came from pages that the guest has kept mapped.
        tx_staged: Counter [slots],
        /// ... by grant copy.
        tx_copied: Counter [slots],
        /// Packets that went straight into another guest's pages.
        tx_crossed: Counter [packets],
        /// Packets to the guest.
        rx_packets: Counter [packets],
        /// Their bytes.
        rx_bytes: Counter [bytes],
        /// Slots that they took.
        rx_slots: Counter [slots],
        /// Those of them that were unsegmented.
        rx_gso: Counter [packets],
        /// Those of them with a blank checksum.
        rx_csum_blank: Counter [packets],
        /// Packets to the guest that did not fit: longer than it takes.
        rx_dropped_size: Counter [packets],
        /// ... they are not of the vif's VLAN (`vlan`).
        rx_dropped_vlan: Counter [packets],
        /// ... a page could not be written.
        rx_dropped_copy: Counter [packets],
        /// ... a checksum or segmentation could not be done.
        rx_dropped_offload: Counter [packets],
        /// ... the guest gave no pages for too long.
        rx_dropped_stalled: Counter [packets],
        /// ... the link is down.
        rx_dropped_link: Counter [packets],
        /// ... the queue that the guest's hash says was too busy.
        rx_dropped_steered: Counter [packets],
        /// Packets handed to another queue, as the guest's hash says.
        rx_steered: Counter [packets],
        /// Packets to group addresses that the guest has not named.
        rx_filtered: Counter [packets],
        /// Grant copies' calls for packets to the guest.
        rx_batches: Counter [calls],
        /// Slots whose bytes went to pages that the guest has kept mapped.
        rx_staged: Counter [slots],
        /// ... by grant copy.
        rx_copied: Counter [slots],
        /// Packets that the thread of another vif's queue has put into the guest's pages.
        rx_crossed: Counter [packets],
        /// Times the guest gave no pages for too long.
        rx_stalls: Counter [stalls],
        /// Times the queue's thread went to sleep.
        sleeps: Counter [sleeps],
        /// Polls that found work before the thread would have slept.
        polls_paid: Counter [polls],
        /// Processor time of the queue's thread.
        cpu_ns: Gauge [ns],
    }
}
