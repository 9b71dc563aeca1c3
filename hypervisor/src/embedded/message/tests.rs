use proptest::prelude::*;

use super::*;

fn any_access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::ReadOnly), Just(Access::ReadWrite)]
}

fn any_refs() -> impl Strategy<Value = Vec<GrantRef>> {
    prop::collection::vec(any::<u32>(), 0..20)
}

fn any_copy() -> impl Strategy<Value = Copy> {
    (any::<u32>(), any::<u16>(), any::<u16>(), any::<u64>(), any_access())
        .prop_map(|(gref, offset, len, at, access)| Copy { gref, offset, len, at, access })
}

fn any_move() -> impl Strategy<Value = Move> {
    let page = any::<(u16, u32, u16)>();
    let page = page.prop_map(|(domid, gref, offset)| Source::Page { domid, gref, offset });
    let source = prop_oneof![any::<usize>().prop_map(Source::Buffer), page];
    (source, any::<(u32, u16, u16)>()).prop_map(|(source, (gref, offset, len))| Move {
        source,
        gref,
        offset,
        len,
    })
}

fn any_request() -> impl Strategy<Value = Request> {
    let domid = prop_oneof![Just(None), (0..0x7ff0u16).prop_map(Some)];
    let kind = prop_oneof![Just(Kind::Guest), Just(Kind::Driver)];
    prop_oneof![
        Just(Request::Hello),
        Just(Request::ListDomains),
        (domid, kind, "[a-zäß ]{0,40}").prop_map(|(domid, kind, name)| Request::CreateDomain {
            domid,
            kind,
            name
        }),
        any::<u16>().prop_map(|domid| Request::DestroyDomain { domid }),
        any::<u16>().prop_map(|domid| Request::ConnectDomain { domid }),
        Just(Request::Open { endpoint: Endpoint::Requests }),
        Just(Request::Open { endpoint: Endpoint::Store }),
        (any::<u16>(), any_access()).prop_map(|(peer, access)| Request::OpenArena { peer, access }),
        any::<u32>().prop_map(|arena| Request::SealArena { arena }),
        any::<(u32, u32, u32)>().prop_map(|(arena, first, count)| Request::Grant {
            arena,
            first,
            count
        }),
        any_refs().prop_map(|refs| Request::EndAccess { refs }),
        any::<u16>().prop_map(|peer| Request::AllocUnbound { peer }),
        any::<(u16, u32)>().prop_map(|(domid, port)| Request::Bind { domid, port }),
        any::<u32>().prop_map(|port| Request::Close { port }),
        (any::<u16>(), any_access(), any_refs()).prop_map(|(domid, access, refs)| Request::Map {
            domid,
            access,
            refs
        }),
        any::<u64>().prop_map(|handle| Request::Unmap { handle }),
        any::<u64>().prop_map(|len| Request::Buffer { len }),
        any::<u64>().prop_map(|buffer| Request::FreeBuffer { buffer }),
        (any::<u16>(), any::<u64>(), prop::collection::vec(any_copy(), 0..9))
            .prop_map(|(domid, buffer, ops)| Request::Copy { domid, buffer, ops }),
        (any::<u16>(), any::<u64>(), prop::collection::vec(any_move(), 0..9))
            .prop_map(|(domid, buffer, ops)| Request::Transfer { domid, buffer, ops }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(request in any_request()) {
        prop_assert_eq!(Request::decode(&request.encode()), Some(request));
    }

    /// There is one datagram for each request, so nothing is accepted that would not be sent.
    #[test]
    fn what_is_decoded_is_what_would_be_encoded(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first %= 20;
        }
        if let Some(second) = bytes.get_mut(1) {
            *second = 0;
        }
        if let Some(request) = Request::decode(&bytes) {
            prop_assert_eq!(request.encode(), bytes);
        }
    }

    #[test]
    fn a_datagram_cut_short_or_with_more_is_refused(request in any_request(), extra in any::<u8>()) {
        let whole = request.encode();
        if !matches!(request, Request::CreateDomain { .. }) {
            for cut in 0..whole.len() {
                prop_assert_eq!(Request::decode(&whole[..cut]), None);
            }
            let more = [&whole[..], &[extra]].concat();
            prop_assert_eq!(Request::decode(&more), None);
        }
    }
}

#[test]
fn batches_are_bounded() {
    let refs = vec![8; MAX_REFS];
    let request = Request::EndAccess { refs };
    assert!(request.encode().len() <= MAX_MESSAGE);
    assert!(Request::decode(&request.encode()).is_some());
    let request = Request::EndAccess { refs: vec![8; MAX_REFS + 1] };
    assert_eq!(Request::decode(&request.encode()), None);
    let op = Copy { gref: 8, offset: 0, len: 1, at: 0, access: Access::ReadOnly };
    let request = Request::Copy { domid: 1, buffer: 1, ops: vec![op; MAX_COPIES] };
    assert!(request.encode().len() <= MAX_MESSAGE);
    let op = Move { source: Source::Buffer(1), gref: 8, offset: 0, len: 1 };
    for (ops, is_taken) in [(MAX_COPIES, true), (MAX_COPIES + 1, false)] {
        let request = Request::Transfer { domid: 1, buffer: 1, ops: vec![op; ops] };
        assert!(request.encode().len() <= MAX_MESSAGE);
        assert_eq!(Request::decode(&request.encode()).is_some(), is_taken);
    }
}
