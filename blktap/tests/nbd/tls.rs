//! TLS: with the right certificates it works, with others nothing does.

use std::path::{Path, PathBuf};

use blktap::export::nbd::{Export, Limits, Server, tls};
use blktap::{Disk, MemDisk, NbdDisk, NbdOptions, NbdTarget, blocking};

use super::hostile::Session;
use super::rig::{Ours, run, well};
use super::support::{folder, image, pattern};

fn openssl(args: &[&str]) {
    well("openssl", args);
}

/// An authority with a server and a client, in QEMU's layout.
pub fn credentials(folder: &Path, name: &str) -> PathBuf {
    let dir = folder.join(name);
    std::fs::create_dir(&dir).expect("a folder");
    let path = |file: &str| dir.join(file).to_str().expect("UTF-8").to_owned();
    let (ca, ca_key) = (path("ca-cert.pem"), path("ca-key.pem"));
    let common = ["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let subject = format!("/CN={name} authority");
    let usage = "keyUsage=critical,keyCertSign,cRLSign";
    openssl(
        &[&common[..], &["-keyout", &ca_key, "-out", &ca, "-subj", &subject, "-addext", usage]]
            .concat(),
    );
    for who in ["server", "client"] {
        let (cert, key) = (path(&format!("{who}-cert.pem")), path(&format!("{who}-key.pem")));
        let subject = format!("/CN={who}");
        let usage = format!("extendedKeyUsage={who}Auth");
        let rest = [
            "-keyout",
            &key,
            "-out",
            &cert,
            "-subj",
            &subject,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-addext",
            &usage,
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "keyUsage=critical,digitalSignature,keyEncipherment",
        ];
        openssl(&[&common[..], &rest[..]].concat());
    }
    dir
}

fn serve(folder: &Path, creds: &Path, disk: std::sync::Arc<dyn Disk>) -> (Ours, u16) {
    let config = tls::server(creds).expect("credentials");
    let exports = vec![Export::new("", disk)];
    let mut server = Server::new(exports, Some(config), Limits::default()).expect("a server");
    let at = server.listen_tcp("127.0.0.1", 0).expect("a port");
    (Ours::run(folder, server), at[0].port())
}

#[test]
fn the_right_certificate_works_and_a_wrong_one_fails() {
    let folder = folder();
    let (good, bad) = (credentials(folder.path(), "good"), credentials(folder.path(), "bad"));
    let disk = super::rig::raw(&image(&folder, "disk", 8 << 20));
    let (ours, port) = serve(folder.path(), &good, disk);
    let uri =
        |creds: &Path| format!("nbds://localhost:{port}/?tls-certificates={}", creds.display());
    let info = well("nbdinfo", &[&uri(&good)]);
    assert!(info.contains("with TLS"), "{info}");
    assert!(!run("nbdinfo", &[&uri(&bad)]).status.success());
    assert!(!run("nbdinfo", &[&format!("nbd://localhost:{port}/")]).status.success());
    let source = folder.path().join("source");
    std::fs::write(&source, pattern(1, 8 << 20)).expect("a file");
    let (source, back) = (source.to_str().expect("UTF-8"), folder.path().join("back"));
    well("nbdcopy", &[source, &uri(&good)]);
    well("nbdcopy", &[&uri(&good), back.to_str().expect("UTF-8")]);
    assert!(std::fs::read(back).expect("a copy") == pattern(1, 8 << 20));
    // A server that holds a stranger's certificate is not believed either.
    let other = super::support::folder();
    let (theirs, port) = serve(other.path(), &bad, MemDisk::new(4096));
    let uri = format!("nbds://localhost:{port}/?tls-certificates={}", good.display());
    assert!(!run("nbdinfo", &[&uri]).status.success());
    theirs.end();
    ours.end();
}

#[test]
fn qemu_speaks_tls_with_it() {
    let folder = folder();
    let good = credentials(folder.path(), "good");
    let (ours, port) = serve(folder.path(), &good, MemDisk::new(1 << 20));
    let object = format!("tls-creds-x509,id=t,endpoint=client,dir={}", good.display());
    let options = format!("driver=nbd,host=localhost,port={port},tls-creds=t");
    let args = ["--object", &object, "--image-opts", &options];
    well("qemu-io", &[&args[..], &["-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M"]].concat());
    ours.end();
}

#[test]
fn nothing_is_told_before_tls_and_nothing_is_taken_from_before_it() {
    use blktap::export::nbd::proto::{OPTION_MAGIC, opt, rep};
    let folder = folder();
    let good = credentials(folder.path(), "good");
    let (ours, _) = serve(folder.path(), &good, MemDisk::new(4096));
    let mut session = Session::greet(&ours.socket);
    assert_eq!(session.ask(opt::LIST, &[]), rep::ERR_TLS_REQD);
    assert_eq!(session.ask(opt::GO, &Session::info_data("", &[])), rep::ERR_TLS_REQD);
    session.option(opt::EXPORT_NAME, &[]);
    session.ends();
    // An option that an attacker has put behind STARTTLS.
    let mut session = Session::greet(&ours.socket);
    let mut both = Vec::new();
    for option in [opt::STARTTLS, opt::STRUCTURED_REPLY] {
        both.extend(OPTION_MAGIC.to_be_bytes());
        both.extend(option.to_be_bytes());
        both.extend([0; 4]);
    }
    session.send(&both);
    session.ends();
    let mut session = Session::greet(&ours.socket);
    assert_eq!(session.ask(opt::STARTTLS, &[]), rep::ACK);
    session.send(b"this is no handshake of TLS, whatever else it may be");
    session.ends();
    ours.end();
}

#[test]
fn our_client_speaks_tls_too() {
    let folder = folder();
    let (good, bad) = (credentials(folder.path(), "good"), credentials(folder.path(), "bad"));
    let (ours, port) = serve(folder.path(), &good, MemDisk::new(8 << 20));
    let target = |creds: &Path| {
        let text = format!("nbds://localhost:{port}/?tls-certificates={}", creds.display());
        NbdTarget::parse(&text).expect("a target")
    };
    assert!(NbdDisk::open(NbdOptions::new(target(&bad))).is_err());
    let disk = NbdDisk::open(NbdOptions::new(target(&good))).expect("a disk");
    let mut queue = disk.queue(8).expect("a queue");
    let data = pattern(5, 3 << 20);
    blocking::write_at(&mut *queue, 512, &data).expect("a write");
    blocking::flush(&mut *queue).expect("a flush");
    let mut back = vec![0; data.len()];
    blocking::read_at(&mut *queue, 512, &mut back).expect("a read");
    assert!(back == data);
    drop((queue, disk));
    ours.end();
}
