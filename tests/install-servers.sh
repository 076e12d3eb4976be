#!/bin/sh
# The real servers and clients that the tests talk to: Postfix, Exim, OpenSMTPD, Sendmail, Dovecot, OpenLDAP's slapd;
# PostgreSQL; swaks, HAProxy, curl, nodemailer, msmtp, nmap; iproute2 for networks of their own.
#
# Idempotent, and quick when all is there.  Installs packages only as root, where apt is, and never removes one: a
# machine that has another mail server keeps it, and the tests that need Postfix say that they were skipped.  Nothing
# is started.  Exim, OpenSMTPD and Sendmail would push Postfix out, so that they are only unpacked, into .cache of this
# tree; Exim cannot run without the user Debian-exim, which is made as its package makes it.
# Exit status 1: something could not be had.
set -u

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
cache=$root/.cache/servers
have() { command -v "$1" >/dev/null 2>&1; }
say() { printf '%s\n' "$*" >&2; }

PATH=$PATH:/usr/sbin:/sbin
export PATH DEBIAN_FRONTEND=noninteractive

have_nodemailer() {
    for directory in /usr/share/nodejs /usr/lib/nodejs; do
        [ -d "$directory/nodemailer" ] && return 0
    done
    return 1
}

missing() { # the packages that are to be installed
    have postfix || echo postfix
    have swaks || echo swaks
    have haproxy || echo haproxy
    have curl || echo curl
    have node || echo nodejs
    have_nodemailer || echo node-nodemailer
    have msmtp || echo msmtp
    have dovecot || echo dovecot-core
    [ -x /usr/lib/dovecot/imap-login ] || echo dovecot-imapd
    [ -x /usr/lib/dovecot/pop3-login ] || echo dovecot-pop3d
    have slapd || echo slapd
    have ldapsearch || echo ldap-utils
    ls -d /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || echo postgresql
    have ip || echo iproute2
    have nmap || echo nmap
    have m4 || echo m4
}

exim() {
    "$cache/exim4-daemon-light/usr/sbin/exim4" -C /dev/null -bV >/dev/null 2>&1 && return 0
    [ -x "$cache/exim4-daemon-light/usr/sbin/exim4" ] && [ "$(id -u)" = 0 ] && ! id Debian-exim >/dev/null 2>&1 &&
        useradd --system --user-group --no-create-home --home-dir /var/spool/exim4 --shell /usr/sbin/nologin \
            Debian-exim && "$cache/exim4-daemon-light/usr/sbin/exim4" -C /dev/null -bV >/dev/null 2>&1
}
sendmail() { # it has no option that does nothing: even for its version it wants a configuration
    ldd "$cache/sendmail-bin/usr/libexec/sendmail/sendmail" 2>/dev/null | grep -q 'libdb' &&
        ! ldd "$cache/sendmail-bin/usr/libexec/sendmail/sendmail" | grep -q 'not found'
}
sendmail_cf() { [ -f "$cache/sendmail-cf/usr/share/sendmail/cf/m4/cf.m4" ]; }
opensmtpd() { "$cache/opensmtpd/usr/sbin/smtpd" -h 2>&1 | grep -q '^version'; }

unpacked() { # PACKAGE PROBE: downloaded, unpacked and able to run
    $2 && return 0
    have apt-get && have dpkg-deb || return 1
    mkdir -p -- "$cache/download" && printf '*\n' >"$root/.cache/.gitignore" || return 1
    fetch "$1" || { refresh && fetch "$1"; } || { say "$1 cannot be downloaded"; return 1; }
    for package in "$cache/download/$1"_*.deb; do :; done # the newest name sorts last
    rm -rf -- "${cache:?}/$1" && dpkg-deb -x "$package" "$cache/$1" || return 1
    find "$cache/$1" -perm /6000 -exec chmod ug-s {} + # nothing here needs another's rights
    $2 && return 0
    # Its libraries are installed by their own names; the package itself is not.
    libraries=$(dpkg-deb -f "$package" Depends | tr ',' '\n' | sed -n 's/^ *\(lib[^ |]*\).*/\1/p')
    # shellcheck disable=SC2086 # a list of names
    install $libraries && $2
}

fetch() { # as root apt drops privileges for a download, and cannot write into a home directory
    rm -f -- "$cache/download/$1"_*.deb
    (cd -- "$cache/download" && apt-get -qq -o APT::Sandbox::User=root download "$1") >/dev/null 2>&1
}

refreshed=
refresh() { # the package lists, once
    [ -z "$refreshed" ] || return 1
    refreshed=yes
    [ "$(id -u)" = 0 ] && apt-get -qq update >/dev/null
}

policy=/usr/sbin/policy-rc.d
install() { # PACKAGE...
    [ "$(id -u)" = 0 ] || { say "not root, so that these are not installed: $*"; return 1; }
    have apt-get || { say "no apt-get, so that these are not installed: $*"; return 1; }
    # No service starts: the tests run their own, with their own configuration.
    if [ ! -e "$policy" ]; then
        trap 'rm -f -- "$policy"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" || return 1
    fi
    if have debconf-set-selections; then
        debconf-set-selections <<-'EOF'
		postfix postfix/main_mailer_type select No configuration
		slapd slapd/no_configuration boolean true
		msmtp msmtp/apparmor boolean false
		EOF
    fi
    refresh
    # One after the other where all together will not do: what can be had is had.
    apt_install "$@" && return 0
    failed=0
    for package; do
        apt_install "$package" || { say "$package cannot be installed"; failed=1; }
    done
    return $failed
}

apt_install() {
    apt-get -qq -y --no-install-recommends --no-remove -o Dpkg::Use-Pty=0 install "$@" >/dev/null
}

status=0
packages=$(missing)
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086 # a list of names
    install $packages || status=1
fi
unpacked exim4-daemon-light exim || { say "Exim cannot be run"; status=1; }
unpacked opensmtpd opensmtpd || { say "OpenSMTPD cannot be run"; status=1; }
unpacked sendmail-cf sendmail_cf && unpacked sendmail-bin sendmail || { say "Sendmail cannot be run"; status=1; }
exit $status
