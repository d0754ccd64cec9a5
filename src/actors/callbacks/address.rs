//! Where a callback may go. A caller chooses the address and the server makes the request, so that
//! nothing may be reached by it that the caller could not reach without the server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::{Ipv4Net, Ipv6Net};
use url::{Host, Url};

/// Characters of a callback's URL.
pub const LONGEST_URL: usize = 2048;

/// Why a URL is refused, in words that follow the field's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("must be at most {LONGEST_URL} characters long")]
    TooLong,
    #[error("must be an http or https URL")]
    NotHttp,
    #[error("must not hold a user name or a password")]
    UserInfo,
    #[error("must not lead to a private, local or reserved address")]
    Private,
}

/// Looks at all of a URL but what its name resolves to, which is looked at when it is used.
///
/// # Errors
/// [`Unusable`].
pub fn check(text: &str, allow_private: bool) -> Result<Url, Unusable> {
    if text.chars().count() > LONGEST_URL {
        return Err(Unusable::TooLong);
    }
    // The parser would pass over white space and control characters in silence.
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(Unusable::NotHttp);
    }
    let url = Url::parse(text).map_err(|_| Unusable::NotHttp)?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Unusable::NotHttp);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Unusable::UserInfo);
    }
    let public = match url.host() {
        Some(Host::Ipv4(address)) => is_public(address.into()),
        Some(Host::Ipv6(address)) => is_public(address.into()),
        Some(Host::Domain(name)) => !is_local_name(name),
        None => return Err(Unusable::NotHttp),
    };
    if public || allow_private { Ok(url) } else { Err(Unusable::Private) }
}

/// RFC 6761: these never leave the machine.
fn is_local_name(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

/// What the registries of IANA set apart (RFC 6890 and its successors): this machine and network,
/// private ones, carriers' NAT, link-local, examples, benchmarks, multicast, and what is reserved.
static NOT_PUBLIC_4: LazyLock<Vec<Ipv4Net>> = LazyLock::new(|| {
    let nets = "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 \
                192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 \
                198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4";
    nets.split_whitespace().map(|net| net.parse().expect("a network in a list of ours")).collect()
});

/// Of the global unicast addresses: protocols and tunnels (Teredo, 6to4), and examples.
static NOT_PUBLIC_6: LazyLock<Vec<Ipv6Net>> = LazyLock::new(|| {
    let nets = "2001::/23 2001:db8::/32 2002::/16 3fff::/20";
    nets.split_whitespace().map(|net| net.parse().expect("a network in a list of ours")).collect()
});

/// Whether an address is one that anybody on the Internet can reach.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_PUBLIC_4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => is_public_6(address),
    }
}

/// Global unicast is 2000::/3. Loopback, unspecified, unique local, link-local, multicast and the
/// addresses that IPv4 is mapped to lie beside it.
fn is_public_6(address: Ipv6Addr) -> bool {
    let parts = address.segments();
    if parts[..6] == [0x64, 0xff9b, 0, 0, 0, 0] {
        // A network without IPv4 reaches it by these (RFC 6052).
        let [.., a, b, c, d] = address.octets();
        return is_public(Ipv4Addr::new(a, b, c, d).into());
    }
    parts[0] & 0xe000 == 0x2000 && !NOT_PUBLIC_6.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_internet_are_public() {
        for public in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        assert!(is_public("64:ff9b::1.1.1.1".parse().unwrap()));
        for not in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.18.0.1",
            "203.0.113.7",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:1.1.1.1",
            "::127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "100::1",
        ] {
            assert!(!is_public(not.parse().unwrap()), "{not}");
        }
    }

    #[test]
    fn a_url_is_http_without_a_user_and_leads_nowhere_private() {
        let good = [
            "http://example.com",
            "https://example.com:8443/hook?token=s#x",
            "https://1.1.1.1/",
            "https://[2606:4700::1111]/",
            "https://bücher.example/",
        ];
        for good in good {
            assert!(check(good, false).is_ok(), "{good}");
        }
        let cases = [
            ("", Unusable::NotHttp),
            ("example.com/hook", Unusable::NotHttp),
            ("/hook", Unusable::NotHttp),
            ("ftp://example.com", Unusable::NotHttp),
            ("file:///etc/passwd", Unusable::NotHttp),
            ("http://", Unusable::NotHttp),
            ("http://exa mple.com", Unusable::NotHttp),
            ("http://example.com/\r\nx", Unusable::NotHttp),
            ("http://example.com/\u{0}", Unusable::NotHttp),
            ("https://user@example.com", Unusable::UserInfo),
            ("https://:pass@example.com", Unusable::UserInfo),
            ("http://127.0.0.1:8080/", Unusable::Private),
            ("http://127.1/", Unusable::Private),
            ("http://0x7f000001/", Unusable::Private),
            ("http://2130706433/", Unusable::Private),
            ("http://017700000001/", Unusable::Private),
            ("http://[::1]/", Unusable::Private),
            ("http://[::ffff:169.254.169.254]/", Unusable::Private),
            ("http://localhost/", Unusable::Private),
            ("http://LOCALHOST./", Unusable::Private),
            ("http://a.localhost/", Unusable::Private),
        ];
        for (bad, why) in cases {
            assert_eq!(check(bad, false), Err(why), "{bad:?}");
            assert_eq!(check(bad, true).is_ok(), why == Unusable::Private, "{bad:?}");
        }
        let long = format!("https://example.com/{}", "x".repeat(LONGEST_URL));
        assert_eq!(check(&long, true), Err(Unusable::TooLong));
    }
}
