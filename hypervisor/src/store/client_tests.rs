use super::*;
use std::os::unix::net::UnixStream;

/// A server that answers from a script: (expected kind, reply kind, reply payload).
fn scripted(script: Vec<(Kind, Kind, &'static [u8])>) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut stream = theirs;
        for (expected, kind, payload) in script {
            let mut header = [0; 16];
            stream.read_exact(&mut header).unwrap();
            let word = |i: usize| u32::from_ne_bytes(header[i..i + 4].try_into().unwrap());
            assert_eq!(word(0), expected as u32);
            let mut body = vec![0; word(12) as usize];
            stream.read_exact(&mut body).unwrap();
            stream.write_all(&wire::encode(kind, word(4), word(8), payload)).unwrap();
        }
    });
    Client::new(ours.into()).unwrap()
}

#[test]
fn replies_and_errors_are_told_apart() {
    let client = scripted(vec![
        (Kind::Read, Kind::Read, b"4"),
        (Kind::Read, Kind::Error, b"ENOENT\0"),
        (Kind::Write, Kind::Error, b"EACCES\0"),
        (Kind::Directory, Kind::Directory, b"a\0b\0"),
    ]);
    assert_eq!(client.get("state").unwrap().as_deref(), Some("4"));
    assert_eq!(client.get("state").unwrap(), None);
    let refusal = client.write(Tx::NONE, "/x", "1").unwrap_err();
    assert_eq!(refusal.to_string(), "xenstore: /x: Permission denied (os error 13)");
    assert_eq!(client.list(Tx::NONE, "/").unwrap(), ["a", "b"]);
    assert!(client.get("after the end").is_err());
    client.inbox().bell().recv().unwrap();
    assert_eq!(client.inbox().take(), [super::super::Watched::Closed]);
}

#[test]
fn a_conflict_runs_the_transaction_again() {
    let client = scripted(vec![
        (Kind::TransactionStart, Kind::TransactionStart, b"7\0"),
        (Kind::Write, Kind::Write, b"OK\0"),
        (Kind::TransactionEnd, Kind::Error, b"EAGAIN\0"),
        (Kind::TransactionStart, Kind::TransactionStart, b"8\0"),
        (Kind::Write, Kind::Write, b"OK\0"),
        (Kind::TransactionEnd, Kind::TransactionEnd, b"OK\0"),
    ]);
    let mut seen = Vec::new();
    client
        .transaction(|tx| {
            seen.push(tx.0);
            client.write(tx, "k", "v")
        })
        .unwrap();
    assert_eq!(seen, [7, 8]);
}

#[test]
fn a_long_directory_comes_in_parts() {
    let client = scripted(vec![
        (Kind::Directory, Kind::Error, b"E2BIG\0"),
        (Kind::DirectoryPart, Kind::DirectoryPart, b"1\0a\0b\0"),
        (Kind::DirectoryPart, Kind::DirectoryPart, b"2\0c\0"),
        (Kind::DirectoryPart, Kind::DirectoryPart, b"2\0a\0b\0"),
        (Kind::DirectoryPart, Kind::DirectoryPart, b"2\0c\0\0"),
    ]);
    assert_eq!(client.list(Tx::NONE, "d").unwrap(), ["a", "b", "c"]);
}
