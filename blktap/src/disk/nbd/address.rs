//! Where a server is: QEMU's `nbd:` targets and the URIs of the nbd project (doc/uri.md).

use std::path::PathBuf;

use crate::export::nbd::proto::{MAX_STRING, PORT};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and a TCP port.
    Tcp(String, u16),
}

/// Whether the connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// No.
    Plain,
    /// It must be.
    Tls,
}

/// A server, and which of its exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTarget {
    /// Where.
    pub place: Place,
    /// The export's name; the default one's is empty.
    pub export: String,
    /// From the scheme: `nbds` and `nbds+unix` ask for TLS.
    pub encryption: Encryption,
    /// The URI's `tls-certificates`: a folder with `ca-cert.pem`, and `client-cert.pem` and
    /// `client-key.pem` where the server wants to see them.
    pub certificates: Option<PathBuf>,
}

/// Why a text is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text}: {why}: write nbd:unix:PATH[:exportname=NAME], nbd:HOST:PORT[:exportname=NAME], \
     nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH (nbds for TLS)"
)]
pub struct NotATarget {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Undoes a URI's %XX.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        out.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(out).ok()
}

/// HOST or HOST:PORT, where HOST may be [IPV6].
fn host_and_port(text: &str) -> Option<(String, u16)> {
    let (host, rest) = match text.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => text.find(':').map_or((text, ""), |at| text.split_at(at)),
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => port.parse().ok()?,
        None if rest.is_empty() => PORT,
        None => return None,
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

impl NbdTarget {
    /// Whether a text is meant as a target of this kind.
    pub fn is_meant(text: &str) -> bool {
        ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:"].iter().any(|scheme| text.starts_with(scheme))
    }

    /// Reads a text.
    pub fn parse(text: &str) -> Result<NbdTarget, NotATarget> {
        let wrong = |why| NotATarget { text: text.to_owned(), why };
        let (scheme, rest) = text.split_once(':').ok_or(wrong("no nbd: before it"))?;
        let encryption =
            if scheme.starts_with("nbds") { Encryption::Tls } else { Encryption::Plain };
        let target = match (scheme, rest.strip_prefix("//")) {
            ("nbd" | "nbds" | "nbd+unix" | "nbds+unix", Some(uri)) => {
                Self::parse_uri(uri, scheme.ends_with("+unix"), encryption).map_err(wrong)?
            }
            ("nbd", None) => Self::parse_plain(rest).map_err(wrong)?,
            _ => return Err(wrong("the scheme is unknown")),
        };
        if target.export.len() > MAX_STRING {
            return Err(wrong("the name is longer than 4096 bytes"));
        }
        Ok(target)
    }

    fn parse_plain(text: &str) -> Result<NbdTarget, &'static str> {
        let (place, export) = text.split_once(":exportname=").unwrap_or((text, ""));
        let place = match place.strip_prefix("unix:") {
            Some("") => return Err("the socket has no path"),
            Some(path) => Place::Unix(path.into()),
            None => {
                let (host, port) = host_and_port(place).ok_or("no host and port")?;
                Place::Tcp(host, port)
            }
        };
        let (export, encryption) = (export.to_owned(), Encryption::Plain);
        Ok(NbdTarget { place, export, encryption, certificates: None })
    }

    fn parse_uri(uri: &str, unix: bool, encryption: Encryption) -> Result<Self, &'static str> {
        const BAD_ESCAPE: &str = "a %XX that is none, or text that is not UTF-8";
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let (authority, name) = path.split_once('/').unwrap_or((path, ""));
        let (mut socket, mut certificates) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or("a parameter without a value")?;
            let value = decode(value).ok_or(BAD_ESCAPE)?;
            match key {
                "socket" => socket = Some(value),
                "tls-certificates" => certificates = Some(PathBuf::from(value)),
                _ => return Err("an unknown parameter"),
            }
        }
        let place = match (unix, socket) {
            (true, Some(path)) if authority.is_empty() && !path.is_empty() => {
                Place::Unix(path.into())
            }
            (true, _) => {
                return Err("a Unix socket is named by ?socket=PATH, and there is no host");
            }
            (false, Some(_)) => return Err("a socket goes with nbd+unix"),
            (false, None) => {
                let (host, port) = host_and_port(authority).ok_or("no host")?;
                Place::Tcp(host, port)
            }
        };
        let export = decode(name).ok_or(BAD_ESCAPE)?;
        Ok(NbdTarget { place, export, encryption, certificates })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &str, export: &str) -> Option<(Place, String)> {
        Some((Place::Unix(path.into()), export.to_owned()))
    }
    fn tcp(host: &str, port: u16, export: &str) -> Option<(Place, String)> {
        Some((Place::Tcp(host.to_owned(), port), export.to_owned()))
    }

    #[test]
    fn targets_are_read() {
        for (text, wanted) in [
            ("nbd:unix:/a/b", unix("/a/b", "")),
            ("nbd:unix:/a/b:exportname=c:d", unix("/a/b", "c:d")),
            ("nbd:host:10:exportname=x", tcp("host", 10, "x")),
            ("nbd:[::1]:10", tcp("::1", 10, "")),
            ("nbd://host", tcp("host", 10809, "")),
            ("nbd://host:99/a%20b/c", tcp("host", 99, "a b/c")),
            ("nbds://[fe80::1]:5/", tcp("fe80::1", 5, "")),
            ("nbd+unix:///name?socket=/tmp/x%3f", unix("/tmp/x?", "name")),
            ("nbds+unix://?socket=/x", unix("/x", "")),
            ("nbd:unix:", None),
            ("nbd://", None),
            ("nbd://h:notaport/", None),
            ("nbd+unix:///x", None),
            ("nbd+unix://host/x?socket=/y", None),
            ("nbd://h/x?socket=/y", None),
            ("nbd://h/%zz", None),
            ("nbd://h/?tls-psk=x", None),
            ("nbds:unix:/x", None),
            ("raw:/x", None),
        ] {
            let got = NbdTarget::parse(text).ok().map(|t| (t.place, t.export));
            assert_eq!(got, wanted, "{text}");
        }
        let tls = NbdTarget::parse("nbds://h/?tls-certificates=/c").expect("a target");
        assert_eq!((tls.encryption, tls.certificates), (Encryption::Tls, Some("/c".into())));
    }
}
