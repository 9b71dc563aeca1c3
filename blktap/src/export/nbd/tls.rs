//! TLS with certificates on both sides, from a folder laid out as QEMU's `tls-creds-x509`:
//! `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, or `client-cert.pem` and
//! `client-key.pem`. Pre-shared keys are not there: rustls has them for resumption only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file of them.
    #[error("{}: {why}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// All of them together.
    #[error("{}: {why}", folder.display())]
    Folder {
        /// Where they are.
        folder: PathBuf,
        /// What is wrong.
        why: String,
    },
}

fn in_file<T, E: ToString>(path: &Path, found: Result<T, E>) -> Result<T, CredentialError> {
    found.map_err(|e| CredentialError::File { path: path.to_owned(), why: e.to_string() })
}

fn in_folder<T, E: ToString>(folder: &Path, made: Result<T, E>) -> Result<T, CredentialError> {
    made.map_err(|e| CredentialError::Folder { folder: folder.to_owned(), why: e.to_string() })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let all = in_file(path, CertificateDer::pem_file_iter(path))?;
    let all = in_file(path, all.collect::<Result<Vec<_>, _>>())?;
    if all.is_empty() { in_file(path, Err("no certificate in it")) } else { Ok(all) }
}

fn authority(folder: &Path) -> Result<Arc<RootCertStore>, CredentialError> {
    let path = folder.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        in_file(&path, roots.add(certificate))?;
    }
    Ok(Arc::new(roots))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(folder: &Path, who: &str) -> Result<Identity, CredentialError> {
    let key = folder.join(format!("{who}-key.pem"));
    let chain = certificates(&folder.join(format!("{who}-cert.pem")))?;
    Ok((chain, in_file(&key, PrivateKeyDer::from_pem_file(&key))?))
}

/// A server's credentials: each client needs a certificate that the authority has signed.
pub fn server(folder: &Path) -> Result<Arc<ServerConfig>, CredentialError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = authority(folder)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let verifier = in_folder(folder, verifier.build())?;
    let config =
        ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = in_folder(folder, config)?.with_client_cert_verifier(verifier);
    let (chain, key) = identity(folder, "server")?;
    Ok(Arc::new(in_folder(folder, config.with_single_cert(chain, key))?))
}

/// A client's credentials: the server's certificate must be signed by the authority and be of
/// the host that is connected to. Without `client-cert.pem` the client shows none.
pub fn client(folder: &Path) -> Result<Arc<ClientConfig>, CredentialError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = in_folder(folder, config)?.with_root_certificates(authority(folder)?);
    if !folder.join("client-cert.pem").exists() {
        return Ok(Arc::new(config.with_no_client_auth()));
    }
    let (chain, key) = identity(folder, "client")?;
    Ok(Arc::new(in_folder(folder, config.with_client_auth_cert(chain, key))?))
}
