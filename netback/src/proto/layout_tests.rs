//! The layouts and numbers against Xen's own header, compiled here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use super::*;

type Values = BTreeMap<String, i64>;

const HEADERS: &str = "
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#include <xen/io/netif.h>
";

/// Compiles a program that prints one `NAME VALUE` line for each expression, and runs it.
fn ask_c(expressions: &[&String]) -> Values {
    let dir = tempfile::tempdir().unwrap();
    let mut source = format!("{HEADERS}int main(void) {{\n");
    for e in expressions {
        writeln!(source, "printf(\"%s %lld\\n\", \"{e}\", (long long)({e}));").unwrap();
    }
    source.push_str("return 0; }\n");
    let (c, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&c, source).unwrap();
    let cc = Command::new("cc").arg("-o").arg(&program).arg(&c).output();
    let cc = cc.expect("a C compiler is needed: apt install gcc");
    let errors = String::from_utf8_lossy(&cc.stderr).into_owned();
    assert!(cc.status.success(), "Xen's headers are needed: apt install libxen-dev\n{errors}");
    let output = Command::new(&program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    lines.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

fn agree(ours: Values) {
    assert_eq!(ask_c(&ours.keys().collect::<Vec<_>>()), ours);
}

macro_rules! fields {
    ($into:ident, $t:ty = $c:literal, $($field:ident = $name:literal),+) => {
        $into.insert(format!("sizeof(struct {})", $c), size_of::<$t>() as i64);
        $($into.insert(
            format!("offsetof(struct {}, {})", $c, $name),
            offset_of!($t, $field) as i64,
        );)+
    };
}

#[test]
fn the_layouts_are_the_headers() {
    let mut v = Values::new();
    fields!(
        v,
        TxRequest = "netif_tx_request",
        gref = "gref",
        offset = "offset",
        flags = "flags",
        id = "id",
        size = "size"
    );
    fields!(v, TxResponse = "netif_tx_response", id = "id", status = "status");
    fields!(v, RxRequest = "netif_rx_request", id = "id", pad = "pad", gref = "gref");
    fields!(
        v,
        RxResponse = "netif_rx_response",
        id = "id",
        offset = "offset",
        flags = "flags",
        status = "status"
    );
    fields!(v, ExtraInfo = "netif_extra_info", kind = "type", flags = "flags", data = "u");
    fields!(v, GrefEntry = "xen_netif_gref", gref = "ref", flags = "flags", status = "status");
    fields!(v, CtrlRequest = "xen_netif_ctrl_request", id = "id", kind = "type", data = "data");
    fields!(
        v,
        CtrlResponse = "xen_netif_ctrl_response",
        id = "id",
        kind = "type",
        status = "status",
        data = "data"
    );
    let slots = |p, of: &dyn Fn(usize) -> u32| (p, of(1));
    for (name, count) in [
        slots("netif_tx", &rings::slot_count::<Tx>),
        slots("netif_rx", &rings::slot_count::<Rx>),
        slots("xen_netif_ctrl", &rings::slot_count::<Ctrl>),
    ] {
        v.insert(format!("__CONST_RING_SIZE({name}, 4096)"), count.into());
    }
    agree(v);
}

#[test]
fn the_parts_of_extra_info_are_the_headers() {
    let u = |part: &str| format!("offsetof(struct netif_extra_info, u.{part}) - 2");
    agree(Values::from([
        (u("gso.size"), 0),
        (u("gso.type"), 2),
        (u("mcast.addr"), 0),
        (u("hash.type"), 0),
        (u("hash.algorithm"), 1),
        (u("hash.value"), 2),
    ]));
}

#[test]
fn the_numbers_are_the_headers() {
    let ours: [(&str, i64); 49] = [
        ("NETTXF_csum_blank", TX_CSUM_BLANK.into()),
        ("NETTXF_data_validated", TX_DATA_VALIDATED.into()),
        ("NETTXF_more_data", TX_MORE_DATA.into()),
        ("NETTXF_extra_info", TX_EXTRA_INFO.into()),
        ("NETRXF_data_validated", RX_DATA_VALIDATED.into()),
        ("NETRXF_csum_blank", RX_CSUM_BLANK.into()),
        ("NETRXF_more_data", RX_MORE_DATA.into()),
        ("NETRXF_extra_info", RX_EXTRA_INFO.into()),
        ("NETRXF_gso_prefix", RX_GSO_PREFIX.into()),
        ("NETIF_RSP_DROPPED", RSP_DROPPED.into()),
        ("NETIF_RSP_ERROR", RSP_ERROR.into()),
        ("NETIF_RSP_OKAY", RSP_OKAY.into()),
        ("NETIF_RSP_NULL", RSP_NULL.into()),
        ("XEN_NETIF_NR_SLOTS_MIN", MAX_PACKET_SLOTS as i64),
        ("XEN_NETIF_MAX_TX_SIZE", MAX_TX_SIZE.into()),
        ("XEN_NETIF_GSO_TYPE_TCPV4", GSO_TYPE_TCPV4.into()),
        ("XEN_NETIF_GSO_TYPE_TCPV6", GSO_TYPE_TCPV6.into()),
        ("XEN_NETIF_EXTRA_TYPE_GSO", EXTRA_TYPE_GSO.into()),
        ("XEN_NETIF_EXTRA_TYPE_MCAST_ADD", EXTRA_TYPE_MCAST_ADD.into()),
        ("XEN_NETIF_EXTRA_TYPE_MCAST_DEL", EXTRA_TYPE_MCAST_DEL.into()),
        ("XEN_NETIF_EXTRA_TYPE_HASH", EXTRA_TYPE_HASH.into()),
        // XDP's number is the next one: Linux's copy of the header has it.
        ("XEN_NETIF_EXTRA_TYPE_MAX", EXTRA_TYPE_XDP.into()),
        ("XEN_NETIF_EXTRA_FLAG_MORE", EXTRA_FLAG_MORE.into()),
        ("XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS", CTRL_GET_HASH_FLAGS.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS", CTRL_SET_HASH_FLAGS.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_KEY", CTRL_SET_HASH_KEY.into()),
        ("XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE", CTRL_GET_HASH_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE", CTRL_SET_HASH_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING", CTRL_SET_HASH_MAPPING.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM", CTRL_SET_HASH_ALGORITHM.into()),
        ("XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE", CTRL_GET_GREF_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING", CTRL_ADD_GREF_MAPPING.into()),
        ("XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING", CTRL_DEL_GREF_MAPPING.into()),
        ("XEN_NETIF_CTRLF_GREF_readonly", GREF_READONLY.into()),
        ("XEN_NETIF_CTRL_STATUS_SUCCESS", CTRL_STATUS_SUCCESS.into()),
        ("XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED", CTRL_STATUS_NOT_SUPPORTED.into()),
        ("XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER", CTRL_STATUS_INVALID_PARAMETER.into()),
        ("XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW", CTRL_STATUS_BUFFER_OVERFLOW.into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV4", HASH_TYPE_IPV4.into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP", HASH_TYPE_IPV4_TCP.into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV6", HASH_TYPE_IPV6.into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP", HASH_TYPE_IPV6_TCP.into()),
        ("XEN_NETIF_CTRL_HASH_ALGORITHM_NONE", HASH_ALGORITHM_NONE.into()),
        ("XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ", HASH_ALGORITHM_TOEPLITZ.into()),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV4", 0),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP", 1),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV6", 2),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP", 3),
        ("XEN_NETIF_GSO_TYPE_NONE", 0),
    ];
    agree(ours.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect());
}
