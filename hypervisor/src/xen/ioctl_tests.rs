//! Structures and numbers against libxen-dev's headers, compiled here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use super::*;

const HEADERS: &str = "
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/event_channel.h>
#include <xen/gntdev.h>
#include <xen/gntalloc.h>
#include <xen/evtchn.h>
";

/// Compiles a program that prints one `NAME VALUE` line for each expression, and runs it.
fn ask_c<'a>(expressions: impl Iterator<Item = &'a String>) -> BTreeMap<String, u64> {
    let dir = tempfile::tempdir().unwrap();
    let mut source = format!("{HEADERS}\nint main(void) {{\n");
    for e in expressions {
        writeln!(source, "printf(\"%s %llu\\n\", \"{e}\", (unsigned long long)({e}));").unwrap();
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
    ($into:ident, $t:ty = $c:literal, $($field:ident = $name:literal),+) => {
        $into.insert(format!("sizeof(struct {})", $c), size_of::<$t>() as u64);
        $($into.insert(
            format!("offsetof(struct {}, {})", $c, $name),
            offset_of!($t, $field) as u64,
        );)+
    };
}

#[test]
fn the_structures_are_the_headers() {
    let mut ours = BTreeMap::new();
    fields!(ours, GrantRefOf = "ioctl_gntdev_grant_ref", domid = "domid", gref = "ref");
    fields!(ours, IndexCount = "ioctl_gntdev_unmap_grant_ref", index = "index", count = "count");
    fields!(ours, IndexCount = "ioctl_gntalloc_dealloc_gref", index = "index", count = "count");
    fields!(ours, Copy = "ioctl_gntdev_grant_copy", count = "count", segments = "segments");
    fields!(
        ours,
        CopySegment = "gntdev_grant_copy_segment",
        source = "source",
        dest = "dest",
        len = "len",
        flags = "flags",
        status = "status"
    );
    fields!(
        ours,
        BindInterdomain = "ioctl_evtchn_bind_interdomain",
        remote_domain = "remote_domain",
        remote_port = "remote_port"
    );
    fields!(ours, One = "ioctl_evtchn_bind_unbound_port", value = "remote_domain");
    fields!(ours, One = "ioctl_evtchn_notify", value = "port");
    fields!(ours, Restrict = "ioctl_evtchn_restrict_domid", domid = "domid");
    for (field, offset) in [
        ("virt", offset_of!(CopyPtr, virt)),
        ("foreign.ref", offset_of!(Foreign, gref)),
        ("foreign.offset", offset_of!(Foreign, offset)),
        ("foreign.domid", offset_of!(Foreign, domid)),
    ] {
        let name = format!("offsetof(struct gntdev_grant_copy_segment, source.{field})");
        ours.insert(name, offset as u64);
    }
    assert_eq!(ask_c(ours.keys()), ours);
}

#[test]
fn the_heads_of_variable_structures_are_the_headers() {
    let ours: BTreeMap<String, u64> = [
        ("ioctl_gntdev_map_grant_ref, count", offset_of!(MapHead, count)),
        ("ioctl_gntdev_map_grant_ref, index", offset_of!(MapHead, index)),
        ("ioctl_gntdev_map_grant_ref, refs", size_of::<MapHead>()),
        ("ioctl_gntalloc_alloc_gref, domid", offset_of!(AllocHead, domid)),
        ("ioctl_gntalloc_alloc_gref, flags", offset_of!(AllocHead, flags)),
        ("ioctl_gntalloc_alloc_gref, count", offset_of!(AllocHead, count)),
        ("ioctl_gntalloc_alloc_gref, index", offset_of!(AllocHead, index)),
        ("ioctl_gntalloc_alloc_gref, gref_ids", size_of::<AllocHead>()),
    ]
    .map(|(field, offset)| (format!("offsetof(struct {field})"), offset as u64))
    .into();
    assert_eq!(ask_c(ours.keys()), ours);
}

#[test]
fn the_numbers_are_the_headers() {
    let ours: BTreeMap<String, u64> = [
        ("IOCTL_GNTDEV_MAP_GRANT_REF", u64::from(GNTDEV_MAP)),
        ("IOCTL_GNTDEV_UNMAP_GRANT_REF", GNTDEV_UNMAP.into()),
        ("IOCTL_GNTDEV_GRANT_COPY", GNTDEV_COPY.into()),
        ("IOCTL_GNTALLOC_ALLOC_GREF", GNTALLOC_ALLOC.into()),
        ("IOCTL_GNTALLOC_DEALLOC_GREF", GNTALLOC_DEALLOC.into()),
        ("IOCTL_EVTCHN_BIND_INTERDOMAIN", EVTCHN_BIND_INTERDOMAIN.into()),
        ("IOCTL_EVTCHN_BIND_UNBOUND_PORT", EVTCHN_BIND_UNBOUND.into()),
        ("IOCTL_EVTCHN_NOTIFY", EVTCHN_NOTIFY.into()),
        ("IOCTL_EVTCHN_RESET", EVTCHN_RESET.into()),
        ("IOCTL_EVTCHN_RESTRICT_DOMID", EVTCHN_RESTRICT.into()),
        ("GNTALLOC_FLAG_WRITABLE", ALLOC_WRITABLE.into()),
        ("GNTCOPY_source_gref", COPY_SOURCE_GREF.into()),
        ("GNTCOPY_dest_gref", COPY_DEST_GREF.into()),
        ("sizeof(domid_t)", size_of::<crate::DomId>() as u64),
        ("sizeof(grant_ref_t)", size_of::<crate::GrantRef>() as u64),
        ("sizeof(evtchn_port_t)", size_of::<crate::Port>() as u64),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    assert_eq!(ask_c(ours.keys()), ours);
}
