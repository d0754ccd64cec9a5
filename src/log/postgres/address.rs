//! What `T2M_LOG=postgres://…` says: where the server is, as whom, and whether with TLS. Nothing here
//! ever repeats the password.

use std::path::Path;
use std::sync::Arc;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use rustls_platform_verifier::BuilderVerifierExt;

use super::tls::Tls;
use crate::log::Error;

const FORM: &str = "T2M_LOG: not an address such as postgres://user:password@host:5432/database; \
                    write @ : / ? # % in a password as %40 %3A %2F %3F %23 %25";
const MODES: &str = "T2M_LOG: sslmode is disable, prefer, require or verify-full";

/// A server and a database on it.
pub(super) struct Address {
    pub(super) config: Config,
    roots: Option<String>,
}

impl Address {
    /// # Errors
    /// [`Error::Invalid`], in one sentence without the password.
    pub(super) fn parse(setting: &str) -> Result<Self, Error> {
        let form = || Error::Invalid(FORM.into());
        let (address, options) = setting.split_once('?').unwrap_or((setting, ""));
        // What follows an unescaped @ of a password would be taken for the host, and shown.
        if address.matches('@').count() > 1 || options.contains('@') {
            return Err(form());
        }
        let (mut mode, mut roots, mut others) = (None, None, Vec::new());
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("sslmode", value)) => mode = Some(value),
                Some(("sslrootcert", value)) => {
                    let path = percent_encoding::percent_decode_str(value).decode_utf8();
                    roots = Some(path.map_err(|_| form())?.into_owned());
                }
                _ => others.push(option),
            }
        }
        let rest = format!("{address}?{}", others.join("&"));
        let mut config: Config = rest.parse().map_err(|_| form())?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(form());
        }
        config.ssl_mode(match mode {
            Some("disable") => SslMode::Disable,
            Some("require" | "verify-full") => SslMode::Require,
            Some("prefer") => SslMode::Prefer,
            None if config.get_hosts().iter().all(is_here) => SslMode::Disable,
            None => SslMode::Prefer,
            Some(_) => return Err(Error::Invalid(MODES.into())),
        });
        // After a failover the old server may answer, and refuse what is written.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        if config.get_application_name().is_none() {
            config.application_name("t2m");
        }
        Ok(Self { config, roots })
    }

    /// The certificate is always verified, by the machine's roots or those of `sslrootcert`.
    pub(super) fn tls(&self) -> Result<Tls, Error> {
        let invalid = |what: String| Error::Invalid(format!("T2M_LOG: {what}"));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid(error.to_string()))?;
        let config = match &self.roots {
            None => builder
                .with_platform_verifier()
                .map_err(|error| invalid(format!("the machine's certificates: {error}")))?
                .with_no_client_auth(),
            Some(path) => {
                let roots = roots(Path::new(path))
                    .map_err(|why| invalid(format!("the certificates of sslrootcert: {why}")))?;
                builder.with_root_certificates(roots).with_no_client_auth()
            }
        };
        Ok(Tls(TlsConnector::from(Arc::new(config))))
    }

    /// The database and its server, for people.
    pub(super) fn shown(&self) -> String {
        let hosts: Vec<String> = self
            .config
            .get_hosts()
            .iter()
            .enumerate()
            .map(|(at, host)| match host {
                Host::Tcp(name) => format!("{name}:{}", self.port(at)),
                Host::Unix(path) => path.display().to_string(),
            })
            .collect();
        let database = self.config.get_dbname().or(self.config.get_user()).unwrap_or("postgres");
        format!("database `{database}` at {}", hosts.join(","))
    }

    fn port(&self, at: usize) -> u16 {
        let ports = self.config.get_ports();
        ports.get(at).or(ports.first()).copied().unwrap_or(5432)
    }
}

/// Nothing between here and there can listen.
fn is_here(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => ["localhost", "127.0.0.1", "::1"].contains(&name.as_str()),
    }
}

fn roots(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("none are in the file".into());
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        let check = |setting: &str, mode: SslMode, shown: &str| {
            let address = Address::parse(setting).unwrap_or_else(|e| panic!("{setting}: {e}"));
            assert_eq!(address.config.get_ssl_mode(), mode, "{setting}");
            assert_eq!(address.shown(), shown);
        };
        check("postgres://h/d", SslMode::Prefer, "database `d` at h:5432");
        check("postgresql://u:p%40@h:1/d", SslMode::Prefer, "database `d` at h:1");
        check("postgres://u@localhost/", SslMode::Disable, "database `u` at localhost:5432");
        check(
            "postgres://u@127.0.0.1/d?sslmode=require",
            SslMode::Require,
            "database `d` at 127.0.0.1:5432",
        );
        check("postgres://u@h/d?sslmode=verify-full", SslMode::Require, "database `d` at h:5432");
        check("postgres://u@h/d?sslmode=disable", SslMode::Disable, "database `d` at h:5432");
        check("postgres://u@/d?hostaddr=127.0.0.1", SslMode::Disable, "database `d` at ");
        check("postgres://u@a,b/d", SslMode::Prefer, "database `d` at a:5432,b:5432");
        check("postgres://u@/d?host=/run/pg&port=7", SslMode::Disable, "database `d` at /run/pg");
        check(
            "postgres://u@a:1,b:2/d?application_name=x",
            SslMode::Prefer,
            "database `d` at a:1,b:2",
        );
    }

    #[test]
    fn a_bad_address_is_refused_without_its_password() {
        for setting in [
            "postgres://",
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hunter2@hunter2@h/d",
            "postgres://u:x?hunter2@h/d",
            "postgres://u:hunter2@h/d?sslmode=verify-ca",
            "postgres://u:hunter2@h/d?hunter2=1",
        ] {
            let Err(error) = Address::parse(setting) else { panic!("{setting} was accepted") };
            assert!(matches!(error, Error::Invalid(_)), "{setting}");
            assert!(error.to_string().starts_with("T2M_LOG: "), "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn roots_that_are_not_there_are_refused_with_the_settings_name() {
        let address = Address::parse("postgres://h/d?sslrootcert=/no/such%20file").unwrap();
        let Err(error) = address.tls() else { panic!("made without roots") };
        assert!(
            error.to_string().starts_with("T2M_LOG: the certificates of sslrootcert"),
            "{error}"
        );
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.pem");
        std::fs::write(&empty, b"").unwrap();
        let setting = format!("postgres://h/d?sslrootcert={}", empty.display());
        let Err(error) = Address::parse(&setting).unwrap().tls() else { panic!("made without") };
        assert!(error.to_string().ends_with(": none are in the file"), "{error}");
        Address::parse("postgres://h/d").unwrap().tls().unwrap();
    }
}
