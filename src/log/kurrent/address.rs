//! What `T2M_LOG=esdb://…` says: where the servers are, as whom, and whether with TLS. Nothing here
//! ever repeats the password.

use std::path::Path;

use eventstore::{ClientSettings, Credentials};
use percent_encoding::percent_decode_str;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

use crate::log::Error;

const FORM: &str = "T2M_LOG: not an address such as esdb://user:password@host:2113?tls=true, \
                    esdb://host1:2113,host2:2113 or esdb+discover://cluster.example; write \
                    @ : / ? # % , in a password as %40 %3A %2F %3F %23 %25 %2C";
/// The options that mean something here, in lower case.
const OPTIONS: [&str; 13] = [
    "tls",
    "tlsverifycert",
    "tlscafile",
    "usercertfile",
    "userkeyfile",
    "connectionname",
    "discoveryinterval",
    "maxdiscoverattempts",
    "gossiptimeout",
    "keepaliveinterval",
    "keepalivetimeout",
    "nodepreference",
    "defaultdeadline",
];

/// One server, the seeds of a cluster, or the name under which a cluster is found.
#[derive(Clone)]
pub(super) struct Address {
    pub(super) settings: ClientSettings,
    /// The same for finding a cluster's leader as nobody, where it is sought as a user first.
    pub(super) anonymous: Option<ClientSettings>,
    /// With their escapes undone, which the client would not do.
    pub(super) credentials: Option<Credentials>,
    hosts: String,
}

impl Address {
    /// # Errors
    /// [`Error::Invalid`], in one sentence without the password.
    pub(super) fn parse(setting: &str) -> Result<Self, Error> {
        let form = || Error::Invalid(FORM.into());
        let (scheme, rest) = setting.split_once("://").ok_or_else(form)?;
        let (authority, options) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        // What follows an unescaped @ of a password would be taken for the host, and shown.
        let signs = |text: &str, sign| text.matches(sign).count();
        if signs(authority, '@') > 1 || signs(options, '@') > 0 || authority.contains(['/', '#']) {
            return Err(form());
        }
        let (user, hosts) = match authority.split_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        if hosts.is_empty() || !hosts.split(',').all(is_host) {
            return Err(form());
        }
        let names = options.split('&').filter(|option| !option.is_empty());
        let names: Vec<String> = names
            .map(|option| option.split('=').next().unwrap_or(option).to_ascii_lowercase())
            .collect();
        if names.iter().any(|name| !OPTIONS.contains(&name.as_str())) {
            return Err(Error::Invalid(format!(
                "T2M_LOG: the options of esdb:// are {}",
                OPTIONS.join(", ")
            )));
        }
        let credentials = user.map(credentials).transpose()?;
        // The members of a cluster may want to know who asks for them; the client passes on what
        // it reads here as it stands, so escapes would be wrong.
        let asks = user.filter(|user| !user.contains('%')).map(|user| format!("{user}@"));
        // Reads go to the leader, too: only there is everything that was acknowledged. The client
        // pauses for an interval before its first contact already.
        let mut tail = format!("{hosts}?{options}");
        for (name, value) in [("discoveryInterval", "100"), ("gossipTimeout", "1000")] {
            if !names.contains(&name.to_ascii_lowercase()) {
                tail.push_str(&format!("&{name}={value}"));
            }
        }
        tail.push_str("&nodePreference=leader");
        let settings = |user: &str| -> Result<ClientSettings, Error> {
            format!("{scheme}://{user}{tail}").parse().map_err(|_| form())
        };
        let is_cluster = hosts.contains(',') || scheme.ends_with("+discover");
        let anonymous = (asks.is_some() && is_cluster).then(|| settings("")).transpose()?;
        let settings = settings(asks.as_deref().unwrap_or_default())?;
        Ok(Self { settings, anonymous, credentials, hosts: hosts.to_owned() })
    }

    /// Whether the files that are named are there: the client would panic over some of them.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the option.
    pub(super) fn check_files(&self) -> Result<(), Error> {
        let invalid = |what: &str, why: String| {
            Err(Error::Invalid(format!("T2M_LOG: the certificates of {what}: {why}")))
        };
        if let Some(path) = self.settings.tls_ca_file()
            && let Err(why) = certificates(Path::new(path))
        {
            return invalid("tlsCAFile", why);
        }
        if let Some((certificate, key)) = self.settings.user_certificate() {
            if let Err(why) = certificates(Path::new(certificate)) {
                return invalid("userCertFile", why);
            }
            if let Err(error) = std::fs::metadata(key) {
                return invalid("userKeyFile", error.to_string());
            }
        }
        Ok(())
    }

    /// The servers, for people.
    pub(super) fn shown(&self) -> String {
        match self.settings.is_dns_discovery_enabled() {
            true => format!("the KurrentDB cluster {}", self.hosts),
            false => format!("KurrentDB at {}", self.hosts),
        }
    }
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().is_ok()),
        _ => (host, true),
    };
    !name.is_empty() && port
}

fn credentials(user: &str) -> Result<Credentials, Error> {
    let plain = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded.map(|text| text.into_owned()).map_err(|_| Error::Invalid(FORM.into()))
    };
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    Ok(Credentials::new(plain(name)?, plain(password)?))
}

fn certificates(path: &Path) -> Result<(), String> {
    let mut count = 0;
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())? {
        certificate.map_err(|error| error.to_string())?;
        count += 1;
    }
    if count == 0 {
        return Err("none are in the file".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        let check = |setting: &str, secure: bool, shown: &str| {
            let address = Address::parse(setting).unwrap_or_else(|e| panic!("{setting}: {e}"));
            assert_eq!(address.settings.is_secure_mode_enabled(), secure, "{setting}");
            assert_eq!(address.shown(), shown);
            address
        };
        check("esdb://h", true, "KurrentDB at h");
        check("kurrentdb://h:1?tls=false", false, "KurrentDB at h:1");
        check("esdb://u:p@a:1,b:2,c:3/?tls=false", false, "KurrentDB at a:1,b:2,c:3");
        check("kurrentdb+discover://c.example", true, "the KurrentDB cluster c.example");
        let escaped = check("esdb://u:p%40%2C@h?tls=false", false, "KurrentDB at h");
        assert_eq!(escaped.credentials, Some(Credentials::new("u", "p@,")));
        assert_eq!(*escaped.settings.default_authenticated_user(), None);
        let cluster = check("esdb://u:p@a,b?nodePreference=follower", true, "KurrentDB at a,b");
        assert_eq!(cluster.settings.hosts().len(), 2);
        assert_eq!(cluster.settings.node_preference(), eventstore::NodePreference::Leader);
    }

    #[test]
    fn a_bad_address_is_refused_without_its_password() {
        for setting in [
            "esdb://",
            "esdb://u:hunter2@h:port",
            "esdb://u:hunter2@hunter2@h",
            "esdb://u:x?hunter2@h",
            "esdb://u:hunter2@h?hunter2=1",
            "esdb://u:hunter2@h?tls=perhaps",
            "esdb://u:hunter2@h?keepAliveInterval=x",
            "esdb://u:hunter2@a,b:x",
            "esdb://u:hunter2@h/path",
            "esdb://u:hunter2%FF@h",
        ] {
            let Err(error) = Address::parse(setting) else { panic!("{setting} was accepted") };
            assert!(matches!(error, Error::Invalid(_)), "{setting}");
            assert!(error.to_string().starts_with("T2M_LOG: "), "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn certificates_that_are_not_there_are_refused_with_the_settings_name() {
        let address = Address::parse("esdb://h?tlsCAFile=/no/such%20file").unwrap();
        let error = address.check_files().unwrap_err().to_string();
        assert!(error.starts_with("T2M_LOG: the certificates of tlsCAFile"), "{error}");
        Address::parse("esdb://h").unwrap().check_files().unwrap();
    }
}
