//! `ringback doctor`: whether this host can run backends.

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;

use super::{Context, Result};
use crate::cli::List;

struct Check {
    what: &'static str,
    found: std::result::Result<String, String>,
}

fn check(what: &'static str, found: std::result::Result<String, String>) -> Check {
    Check { what, found }
}

fn checks(context: &Context) -> Vec<Check> {
    let hypervisor = context.hypervisor().map_err(|e| e.to_string());
    let store = hypervisor.as_ref().map_err(Clone::clone).and_then(|h| {
        let store = h.store().map_err(|e| e.to_string())?;
        store.domain_path(h.domid()).map_err(|e| e.to_string())
    });
    let kernels = |module: &str, kind: &str| {
        let loaded = Path::new("/sys/module").join(module.replace('-', "_")).exists();
        let remedy = format!(
            "the kernel's {module} is loaded and takes {kind} nodes first: rmmod {module}, and \
             blacklist it in /etc/modprobe.d"
        );
        if loaded { Err(remedy) } else { Ok("not loaded".to_owned()) }
    };
    let tun = match Path::new("/dev/net/tun").exists() {
        true => Ok("there".to_owned()),
        false => Err("no /dev/net/tun: modprobe tun".to_owned()),
    };
    let engine = blktap::doctor().map_err(|e| e.to_string());
    vec![
        check("hypervisor", hypervisor.map(|h| format!("this is domain {}", h.domid()))),
        check("xenstore", store),
        check("kernel's xen-blkback", kernels("xen-blkback", "vbd")),
        check("kernel's xen-netback", kernels("xen-netback", "vif")),
        check("TAP devices", tun),
        check("io_uring", engine),
    ]
}

/// `ringback doctor`; exit 1 if anything is wrong.
pub fn run(context: &Context, options: &List) -> Result {
    let checks = checks(context);
    let bad = checks.iter().filter(|c| c.found.is_err()).count();
    if options.json {
        let rows: Vec<_> = checks
            .iter()
            .map(|c| match &c.found {
                Ok(text) => json!({"check": c.what, "ok": true, "text": text}),
                Err(text) => json!({"check": c.what, "ok": false, "text": text}),
            })
            .collect();
        outln!("{}", json!({"schema": 1, "checks": rows}));
    } else {
        for c in &checks {
            match &c.found {
                Ok(text) => outln!("ok    {}: {text}", c.what),
                Err(text) => outln!("BAD   {}: {text}", c.what),
            }
        }
    }
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
