//! PEM files and certificates: what is wrong with them, in words that say what to do.

use crate::error::{Error, Result};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;

/// Larger than any chain of certificates; whatever is larger is something else.
const MOST_BYTES: u64 = 4 << 20;

fn read(what: &str, path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let cannot = |e: &dyn std::fmt::Display| Error::Invalid(format!("cannot read {what} {shown}: {e}"));
    tokio::task::block_in_place(|| {
        let found = std::fs::metadata(path).map_err(|e| cannot(&e))?;
        if !found.is_file() || found.len() > MOST_BYTES {
            return Err(Error::Invalid(format!("{what} {shown} is not a PEM file")));
        }
        let bytes = std::fs::read(path).map_err(|e| cannot(&e))?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(Error::Invalid(format!("{what} {shown} is empty")));
        }
        Ok(bytes)
    })
}

/// Checks a file of certificates before it is used: the NATS client takes one without any for one that trusts nobody.
///
/// # Errors
/// `Invalid` with the file's name.
pub(super) fn check_certificates(what: &str, path: &Path) -> Result<()> {
    let bytes = read(what, path)?;
    let none = |why: String| Error::Invalid(format!("{what} {} holds no certificate{why}", path.display()));
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.iter().any(|der| der.first() == Some(&0x30)) => Ok(()),
        Ok(_) => Err(none(" in PEM form (-----BEGIN CERTIFICATE-----)".into())),
        Err(error) => Err(none(format!(" that can be read: {error}"))),
    }
}

/// Checks a file with a key.
///
/// # Errors
/// `Invalid` with the file's name.
pub(super) fn check_key(what: &str, path: &Path) -> Result<()> {
    let bytes = read(what, path)?;
    match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Invalid(format!(
            "{what} {} holds no private key in PEM form (-----BEGIN PRIVATE KEY-----): {error}",
            path.display()
        ))),
    }
}

const OTHER_KEY: &str = "the key of --tls-key does not belong to the certificate of --tls-cert";

/// Whether nothing that happens elsewhere can mend it.
pub(super) fn is_about_own_files(said: &str) -> bool {
    said == OTHER_KEY
}

/// What a failed handshake means, if it is about certificates.
pub(super) fn about_certificates(text: &str, servers: &str) -> Option<String> {
    let says = |words: &str| text.contains(words);
    // An alert is what the server says of us.
    let said = if says("AlertReceived(CertificateExpired)") {
        format!("the server at {servers} says that our certificate has expired: renew the one of --tls-cert")
    } else if says("AlertReceived(CertificateRequired)") {
        format!("the server at {servers} wants a client certificate: see --tls-cert and --tls-key")
    } else if says("AlertReceived(UnknownCA)")
        || says("AlertReceived(BadCertificate)")
        || says("AlertReceived(CertificateUnknown)")
        || says("AlertReceived(UnknownCa)")
    {
        format!(
            "the server at {servers} does not accept our certificate: see --tls-cert, and the CA that the server trusts"
        )
    } else if says("Expired") {
        format!("the certificate of {servers} has expired: renew it on the server")
    } else if says("NotValidYet") {
        format!("the certificate of {servers} is not valid yet: look at the clocks of both machines")
    } else if says("UnknownIssuer") {
        format!(
            "the certificate of {servers} is from a CA that is not trusted here: name its CA with --tls-ca"
        )
    } else if says("NotValidForName") || says("not valid for name") {
        format!("the certificate of {servers} is for another host name: connect by a name that it has")
    } else if says("invalid peer certificate") || says("InvalidCertificate") {
        format!("the certificate of {servers} is not valid: {text}")
    } else if says("could not add certificate or key") {
        OTHER_KEY.to_owned()
    } else {
        return None;
    };
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_that_fails_is_said_in_words() {
        let said = |text: &str| about_certificates(text, "tls://h:4222").unwrap_or_default();
        assert!(said("IO error: invalid peer certificate: Expired").contains("of tls://h:4222 has expired"));
        assert!(
            said("invalid peer certificate: certificate expired: verification time 1; ExpiredContext")
                .contains("expired")
        );
        assert!(said("invalid peer certificate: UnknownIssuer").contains("--tls-ca"));
        assert!(said("received fatal alert: AlertReceived(CertificateRequired)").contains("--tls-cert"));
        assert_eq!(about_certificates("connection refused", "h"), None);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn missing_empty_and_other_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let garbage = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n";
        let cases = [
            (dir.path().join("missing.pem"), "cannot read"),
            (file("empty.pem", " \n"), "is empty"),
            (file("text.pem", "hello"), "holds no certificate"),
            (file("garbage.pem", garbage), "holds no certificate"),
            (dir.path().to_owned(), "is not a PEM file"),
        ];
        for (path, words) in cases {
            let error = check_certificates("the CA file", &path).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(&path.display().to_string()), "{error}");
            assert!(check_key("the key file", &path).is_err());
        }
        let good = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        assert_eq!(check_certificates("the CA file", &file("good.pem", good)), Ok(()));
    }
}
