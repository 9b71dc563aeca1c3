//! The layouts against Xen's own header, compiled here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use super::wire::{WireSegment, packed4, packed8};
use super::*;

type Values = BTreeMap<String, i64>;

const HEADERS: &str = r#"
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#include <xen/io/protocols.h>
"#;

/// Makes the rest of the file see 64-bit numbers as a 32-bit x86 compiler does.
const I386: &str = r#"
typedef uint64_t __attribute__((aligned(4))) i386_uint64_t;
#define uint64_t i386_uint64_t
#undef __i386__
#define __i386__ 1
"#;

/// Compiles a program that prints one `NAME VALUE` line for each expression, and runs it.
fn ask_c(preamble: &str, expressions: &[String]) -> Values {
    let dir = tempfile::tempdir().unwrap();
    let mut source = format!("{HEADERS}{preamble}\n#include <xen/io/blkif.h>\nint main(void) {{\n");
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

macro_rules! fields {
    ($into:ident, $t:ty = $c:literal, $($field:ident),+) => {
        $into.insert(format!("sizeof(struct {})", $c), size_of::<$t>() as i64);
        $($into.insert(
            format!("offsetof(struct {}, {})", $c, stringify!($field)),
            offset_of!($t, $field) as i64,
        );)+
    };
}

macro_rules! ours {
    ($module:ident) => {{
        let mut v = Values::new();
        fields!(
            v,
            $module::Direct = "blkif_request",
            operation,
            nr_segments,
            handle,
            id,
            sector_number,
            seg
        );
        fields!(
            v,
            $module::Discard = "blkif_request_discard",
            operation,
            flag,
            handle,
            id,
            sector_number,
            nr_sectors
        );
        fields!(
            v,
            $module::Indirect = "blkif_request_indirect",
            operation,
            indirect_op,
            nr_segments,
            id,
            sector_number,
            handle,
            indirect_grefs
        );
        fields!(v, $module::Response = "blkif_response", id, operation, status);
        fields!(v, WireSegment = "blkif_request_segment", gref, first_sect, last_sect);
        v
    }};
}

fn agree(preamble: &str, ours: Values) {
    let names: Vec<String> = ours.keys().cloned().collect();
    assert_eq!(ask_c(preamble, &names), ours);
}

#[test]
fn the_64_bit_layout_is_the_headers() {
    agree("", ours!(packed8));
    assert_eq!(size_of::<<X86_64 as Abi>::Req>(), 112);
    assert_eq!(size_of::<<X86_64 as Abi>::Rsp>(), 16);
}

#[test]
fn the_32_bit_layout_is_the_headers() {
    agree(I386, ours!(packed4));
    assert_eq!(size_of::<<X86_32 as Abi>::Req>(), 108);
    assert_eq!(size_of::<<X86_32 as Abi>::Rsp>(), 12);
    assert_ne!(ours!(packed4), ours!(packed8));
}

#[test]
fn the_numbers_are_the_headers() {
    let ours: [(&str, i64); 16] = [
        ("BLKIF_OP_READ", OP_READ.into()),
        ("BLKIF_OP_WRITE", OP_WRITE.into()),
        ("BLKIF_OP_WRITE_BARRIER", OP_WRITE_BARRIER.into()),
        ("BLKIF_OP_FLUSH_DISKCACHE", OP_FLUSH_DISKCACHE.into()),
        ("BLKIF_OP_DISCARD", OP_DISCARD.into()),
        ("BLKIF_OP_INDIRECT", OP_INDIRECT.into()),
        ("BLKIF_RSP_OKAY", RSP_OKAY.into()),
        ("BLKIF_RSP_ERROR", RSP_ERROR.into()),
        ("BLKIF_RSP_EOPNOTSUPP", RSP_EOPNOTSUPP.into()),
        ("BLKIF_DISCARD_SECURE", DISCARD_SECURE.into()),
        ("BLKIF_MAX_SEGMENTS_PER_REQUEST", MAX_SEGMENTS as i64),
        ("BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST", MAX_INDIRECT_PAGES as i64),
        ("VDISK_CDROM", VDISK_CDROM.into()),
        ("VDISK_REMOVABLE", VDISK_REMOVABLE.into()),
        ("VDISK_READONLY", VDISK_READONLY.into()),
        ("sizeof(blkif_sector_t)", 8),
    ];
    agree("", ours.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect());
}

#[test]
fn the_protocol_names_are_the_headers() {
    for (macro_name, ours) in [
        ("XEN_IO_PROTO_ABI_X86_32", X86_32::PROTOCOL),
        ("XEN_IO_PROTO_ABI_X86_64", X86_64::PROTOCOL),
        ("XEN_IO_PROTO_ABI_NATIVE", Native::PROTOCOL),
    ] {
        let name = "SAME".to_owned();
        let preamble = format!("#define SAME !strcmp({macro_name}, \"{ours}\")");
        assert_eq!(ask_c(&preamble, std::slice::from_ref(&name))[&name], 1, "{macro_name}");
    }
}
