use super::*;

#[test]
fn a_missing_device_comes_with_its_remedy() {
    let error = open("/nowhere/xen/gntdev", "xen-gntdev").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let remedy = match Path::new("/sys/hypervisor/type").exists() {
        true => "load its module: modprobe xen-gntdev",
        false => "this host does not run on Xen; --hypervisor SOCKET uses the bundled one",
    };
    let text = format!("/nowhere/xen/gntdev: No such file or directory (os error 2): {remedy}");
    assert_eq!(error.to_string(), text);
}

#[test]
fn without_xen_nothing_pretends_to_be_it() {
    if !Path::new(EVTCHN).exists() {
        assert_eq!(Xen::open().err().unwrap().kind(), io::ErrorKind::NotFound);
    }
}
