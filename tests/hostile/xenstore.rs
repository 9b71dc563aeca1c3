//! A frontend's keys: missing, absurd, another's, or changed when it is too late.

use blkback::proto::RSP_OKAY;
use hypervisor::Guest;
use hypervisor::store::Tx;
use hypervisor::xenbus::State;

use crate::guest::{PLAIN, Wish, read, whole};
use crate::scene::{BAD, GOOD, Scene};

/// Keys to set, or to remove with `None`, before the frontend says that it is ready, and the
/// error that must follow. `{}` is the device's name in messages.
type Case<'a> = (&'a [(&'a str, Option<&'a str>)], &'a str);

fn all(wish: Wish, cases: &[Case]) {
    let scene = Scene::with(&["--set", "max_queues=2"]);
    for (keys, error) in cases {
        scene.during(|| {
            scene.wait(State::InitWait);
            let queues = scene.domain.prepare(BAD, wish);
            for (key, value) in *keys {
                match value {
                    Some(value) => scene.domain.set(BAD, key, value),
                    None => scene.domain.unset(BAD, key),
                }
            }
            scene.domain.set_state(BAD, State::Initialised);
            scene.fails_with(error);
            drop(queues);
        });
        for (key, _) in *keys {
            scene.domain.unset(BAD, key);
        }
        scene.domain.set_state(BAD, State::Closed);
        scene.wait(State::Closed);
        scene.domain.set_state(BAD, State::Initialising);
    }
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    drop((queue, page));
    scene.finish();
}

#[test]
fn keys_that_are_missing_or_no_numbers() {
    let long = "9".repeat(2000);
    let wide = "\u{1F4A3}".repeat(60);
    let shown_wide = "\u{1F4A3}".repeat(40);
    all(
        PLAIN,
        &[
            (&[("ring-ref", None)], "frontend key ring-ref is missing"),
            (&[("event-channel", None)], "frontend key event-channel is missing"),
            (&[("event-channel", Some("0"))], "frontend key event-channel is 0, which is no port"),
            (
                &[("event-channel", Some(""))],
                r#"frontend key event-channel is "", which is not a number"#,
            ),
            (
                &[("event-channel", Some("-1"))],
                r#"frontend key event-channel is "-1", which is not a number"#,
            ),
            (
                &[("event-channel", Some("+1"))],
                r#"frontend key event-channel is "+1", which is not a number"#,
            ),
            (
                &[("event-channel", Some("4294967296"))],
                r#"frontend key event-channel is "4294967296", which is not a number"#,
            ),
            (
                &[("ring-ref", Some("0x10"))],
                r#"frontend key ring-ref is "0x10", which is not a number"#,
            ),
            (
                &[("ring-ref", Some("8\n9"))],
                r#"frontend key ring-ref is "8\n9", which is not a number"#,
            ),
            (
                &[("ring-ref", Some(&long))],
                &format!("frontend key ring-ref is {:?}, which is not a number", &long[..40]),
            ),
            (
                &[("ring-ref", Some(&wide))],
                &format!("frontend key ring-ref is {shown_wide:?}, which is not a number"),
            ),
            (
                &[("protocol", Some("sparc-abi"))],
                r#"frontend key protocol is "sparc-abi"; x86_64-abi and x86_32-abi are supported"#,
            ),
            (
                &[("feature-persistent", Some("yes"))],
                r#"frontend key feature-persistent is "yes", which is not a number"#,
            ),
        ],
    );
}

#[test]
fn keys_that_are_absurd() {
    all(
        PLAIN,
        &[
            (
                &[("multi-queue-num-queues", Some("0"))],
                "frontend key multi-queue-num-queues is 0; 1 to 2 were offered",
            ),
            (
                &[("multi-queue-num-queues", Some("4294967295"))],
                "frontend key multi-queue-num-queues is 4294967295; 1 to 2 were offered",
            ),
            (&[("multi-queue-num-queues", Some("2"))], "frontend key queue-0/ring-ref is missing"),
            (
                &[("ring-page-order", Some("5"))],
                "frontend key ring-page-order is 5; 0 to 4 were offered",
            ),
            (
                &[("ring-page-order", Some("32"))],
                "frontend key ring-page-order is 32; 0 to 4 were offered",
            ),
            (
                &[("num-ring-pages", Some("0"))],
                "frontend key num-ring-pages is 0; 1 to 16 were offered",
            ),
            (
                &[("num-ring-pages", Some("17"))],
                "frontend key num-ring-pages is 17; 1 to 16 were offered",
            ),
            (
                &[("num-ring-pages", Some("3"))],
                "frontend key num-ring-pages is 3, which is not a power of two",
            ),
            (
                &[("num-ring-pages", Some("4")), ("ring-page-order", Some("1"))],
                "frontend keys ring-page-order (1) and num-ring-pages (4) disagree",
            ),
            (&[("ring-page-order", Some("2"))], "frontend key ring-ref0 is missing"),
            (
                &[
                    ("ring-page-order", Some("1")),
                    ("ring-ref0", Some("9")),
                    ("ring-ref1", Some("9")),
                ],
                "frontend key ring-ref names a page of another ring",
            ),
        ],
    );
}

#[test]
fn queues_that_share() {
    let scene = Scene::with(&["--set", "max_queues=2"]);
    let wish = Wish { queues: 2, ..PLAIN };
    for (key, error) in [
        ("ring-ref", "frontend key queue-1/ring-ref names a page of another ring"),
        ("event-channel", "frontend key queue-1/event-channel names the port of another queue"),
    ] {
        scene.during(|| {
            scene.wait(State::InitWait);
            let queues = scene.domain.prepare(BAD, wish);
            let path = format!("device/vbd/{BAD}/queue-0/{key}");
            let first = scene.domain.store.get(&path).unwrap().unwrap();
            scene.domain.set(BAD, &format!("queue-1/{key}"), &first);
            scene.domain.set_state(BAD, State::Initialised);
            scene.fails_with(error);
            drop(queues);
        });
        scene.domain.set_state(BAD, State::Closed);
        scene.wait(State::Closed);
        scene.domain.set_state(BAD, State::Initialising);
    }
    scene.finish();
}

/// Ports that are another domain's, for another domain, or taken.
#[test]
fn ports_that_are_not_to_be_had() {
    let scene = Scene::start();
    // More than the hostile guest has.
    let theirs: Vec<_> = (0..40).map(|_| scene.other.guest.alloc_unbound(0).unwrap()).collect();
    let far = theirs.last().unwrap().port();
    let foreign = scene.domain.guest.alloc_unbound(scene.other.id).unwrap();
    let taken = format!("device/vbd/{GOOD}/event-channel");
    let taken: u32 = scene.domain.store.get(&taken).unwrap().unwrap().parse().unwrap();
    for port in [far, foreign.port(), taken, u32::MAX] {
        scene.during(|| {
            scene.wait(State::InitWait);
            let queues = scene.domain.prepare(BAD, PLAIN);
            scene.domain.set(BAD, "event-channel", &port.to_string());
            scene.domain.set_state(BAD, State::Initialised);
            scene.fails_with(&format!(
                "{{}}.0: binding event-channel {port}: Invalid argument (os error 22)"
            ));
            drop(queues);
        });
        scene.domain.set_state(BAD, State::Closed);
        scene.wait(State::Closed);
        scene.domain.set_state(BAD, State::Initialising);
    }
    drop((theirs, foreign));
    scene.finish();
}

/// What is no text is no key.
#[test]
fn keys_that_are_not_text() {
    let scene = Scene::start();
    scene.during(|| {
        scene.wait(State::InitWait);
        let queues = scene.domain.prepare(BAD, PLAIN);
        let path = format!("device/vbd/{BAD}/ring-ref");
        scene.domain.store.write(Tx::NONE, &path, [0xff, 0xfe, 0x80]).unwrap();
        scene.domain.set_state(BAD, State::Initialised);
        scene.fails_with("frontend key ring-ref is missing");
        drop(queues);
    });
    scene.finish();
}

/// Once the two are connected the keys mean nothing.
#[test]
fn keys_that_change_after_connect() {
    let scene = Scene::start();
    let mut queue = scene.connect(PLAIN);
    let page = scene.domain.pages(1);
    scene.during(|| {
        for value in ["0", "", "4294967295", "-5", "nonsense"] {
            for key in [
                "ring-ref",
                "event-channel",
                "protocol",
                "feature-persistent",
                "ring-page-order",
                "num-ring-pages",
                "multi-queue-num-queues",
            ] {
                scene.domain.set(BAD, key, value);
                assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY, "{key}={value}");
            }
        }
        scene.domain.unset(BAD, "ring-ref");
        assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
        assert_eq!(scene.state(), Some(State::Connected));
    });
    for key in ["ring-page-order", "num-ring-pages", "multi-queue-num-queues"] {
        scene.domain.unset(BAD, key);
    }
    drop(queue);
    let mut queue = scene.again(PLAIN);
    assert_eq!(queue.ask(read(0, &[whole(page.refs()[0])])), RSP_OKAY);
    drop((queue, page));
    scene.finish();
}

/// What belongs to the backend cannot be written by the guest.
#[test]
fn a_guest_cannot_write_the_backends_keys() {
    let scene = Scene::start();
    let base = format!("/local/domain/0/backend/vbd/{}/{BAD}", scene.domain.id);
    for key in ["state", "params", "frontend", "mode", "options", "new"] {
        let written = scene.domain.store.write(Tx::NONE, &format!("{base}/{key}"), "x");
        assert!(written.is_err(), "{key}");
    }
    let error = format!("/local/domain/0/error/backend/vbd/{}/{BAD}/error", scene.domain.id);
    assert!(scene.domain.store.write(Tx::NONE, &error, "x").is_err());
    scene.finish();
}
