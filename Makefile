# What a person does with a checkout. `make` alone prints the list.

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= python3
PYTEST_ARGS ?=
# Where zsh looks; $PREFIX/share/zsh/site-functions where it is empty.
ZSHDIR ?=
# Where `make deb` puts the package.
OUT ?= build

HOOKS := pyqemu-ifup pyqemu-ifdown
PROGRAMS := pyqemu-ifctl pyqemu-ifd pyqemu-bridge-helper
ROOMS := $(wildcard conf ifup ifdown ifctl ifd)
PAGES := $(sort $(wildcard $(addsuffix /*.5,$(ROOMS)) $(addsuffix /*.8,$(ROOMS))))
SCHEMAS := $(wildcard conf/*.schema.json ifctl/*.schema.json)
UNITS := $(sort $(wildcard conf/systemd/*))
DOCS := $(wildcard README.md CHANGELOG.md LICENSE SECURITY.md CONTRIBUTING.md docs/*.md)

# NOTE: recipes read these from the environment, quoted, so that no path is ever shell text; and
# no PYTHON* variable of the caller's reaches a Python that root runs.
export PREFIX DESTDIR PYTHON ZSHDIR OUT
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONINSPECT PYTHONUSERBASE PYTHONPLATLIBDIR \
	PYTHONPYCACHEPREFIX PYTHONDONTWRITEBYTECODE PYTHONOPTIMIZE PYTHONSAFEPATH PYTHONWARNINGS

.ONESHELL:
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.PHONY: help install uninstall deb test lint demo bench clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# Refuses what cannot work and sets $home, the final place of the programs' own venv.
define CHECK_PREFIX
fail() { echo "make $@: $$1" >&2; exit 1; }
case $$PREFIX in
/*[[:space:]]*) fail "PREFIX=$$PREFIX: the first line of a program cannot hold white space" ;;
/*) PREFIX=$${PREFIX%/} ;;
*) fail "PREFIX=$$PREFIX: not an absolute path" ;;
esac
case $$DESTDIR in ''|/*) ;; *) DESTDIR=$$PWD/$$DESTDIR ;; esac
home=$$PREFIX/lib/pyqemu-ifup
endef

# Refuses a Python that is too old, or that cannot make a venv.
define CHECK_PYTHON
"$$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
	fail "$$PYTHON is not Python 3.10 or later; name one: make $@ PYTHON=python3.11"
"$$PYTHON" -I -c 'import ensurepip, venv' 2>/dev/null ||
	fail "$$PYTHON makes no virtual environments; apt-get install python3-venv"
endef

install: ## install into PREFIX (/usr/local), under DESTDIR
	@export LC_ALL=C PIP_ROOT_USER_ACTION=ignore
	umask 022
	$(CHECK_PREFIX)
	$(CHECK_PYTHON)
	# NOTE: the kernel reads 256 bytes of a script (BINPRM_BUF_SIZE) and cuts a longer first line
	# without a word: the S of -IS would be the first to go.
	shebang="#!$$home/bin/python3 -IS"
	[ $${#shebang} -le 255 ] ||
		fail "PREFIX=$$PREFIX: too long for the first line of a program; 255 bytes is the most"
	root=$$DESTDIR$$home
	stage=$$root.new
	tree=$$(mktemp -d)
	# Makes a folder, and notes each that was not there before, for uninstall to take away.
	folder() {
		at=$$1
		while [ -n "$$at" ] && [ ! -e "$$DESTDIR$$at" ]; do
			echo "$$at/" >>"$$tree/folders"
			at=$${at%/*}
		done
		mkdir -p "$$DESTDIR$$1"
	}
	trap 'rm -rf "$$tree" "$$stage"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM
	rm -rf "$$stage"
	folder "$${home%/*}"
	echo "make install: the programs' own Python packages, from PyPI, in $$home: about a minute"
	"$$PYTHON" -I -m venv "$$stage"
	# NOTE: from a copy, since pip leaves build/ in a tree, and takes what lies in build/ along.
	cp -R setup.cfg setup.py pyproject.toml LICENSE $(wildcard README.md) $(ROOMS) "$$tree"
	"$$stage/bin/python3" -I -m pip install --quiet --no-input --no-compile \
		--constraint conf/constraints.txt "$$tree"
	"$$stage/bin/python3" -I -m pip check --quiet
	"$$stage/bin/python3" -I -m pip uninstall --quiet --quiet --yes wheel setuptools pip
	# NOTE: what names the place of the build, and nothing at run time reads.
	find "$$stage/bin" ! -type d ! -name 'python*' -delete
	find "$$stage/lib" -name direct_url.json -delete
	find "$$stage/lib" -name RECORD -exec \
		sed -i -e '/^[./]*\/bin\//d' -e '/\/direct_url\.json,/d' {} +
	sed -i '/^command *=/d' "$$stage/pyvenv.cfg"
	# NOTE: the compiled code holds the time of its source.
	if [ -n "$${SOURCE_DATE_EPOCH:-}" ]; then
		find "$$stage/lib" -name '*.py' -exec touch -d "@$$SOURCE_DATE_EPOCH" {} +
	fi
	"$$stage/bin/python3" -I -m compileall -qq -f -j 0 --invalidation-mode timestamp \
		-s "$$stage" -p "$$home" "$$stage/lib" ||
		fail "$$stage/lib: does not compile"
	if grep -rqF "$$stage" "$$stage"; then fail "$$stage: names itself; $$root left as it was"; fi
	: >"$$stage/installed"
	echo "make install: the programs, in $$PREFIX/bin"
	put() {
		folder "$${3%/*}"
		install -m "$$1" "$$2" "$$DESTDIR$$3.new"
		mv -f "$$DESTDIR$$3.new" "$$DESTDIR$$3"
		echo "$$3" >>"$$root/installed"
	}
	chmod -R u=rwX,go=rX "$$stage"
	rm -rf "$$root.old"
	if [ -e "$$root" ]; then mv "$$root" "$$root.old"; fi
	mv "$$stage" "$$root"
	site=$$(cd "$$root" && echo lib/python3*/site-packages)
	for program in $(HOOKS); do
		{ echo "$$shebang"; sed "s|@program@|$$program|; s|@site@|$$site|" conf/hook.in; } \
			>"$$tree/$$program"
		put 0755 "$$tree/$$program" "$$PREFIX/bin/$$program"
	done
	for program in $(PROGRAMS); do
		module=$$(echo "$$program" | tr - _).main
		[ "$$program" != pyqemu-bridge-helper ] || module=pyqemu_ifd.bridge_helper
		{ echo "$${shebang%S}"; sed "s/@module@/$$module/" conf/launcher.in; } \
			>"$$tree/$$program"
		put 0755 "$$tree/$$program" "$$PREFIX/bin/$$program"
	done
	# NOTE: sed takes a & and a comma here for its own.
	place=$$(printf %s "$$PREFIX" | sed 's/[&,\]/\\&/g')
	here="s,/usr/local/\\(s\\?bin\\|lib\\|share\\)\\b,$$place/\\1,g"
	# Puts a page there that says where what it tells of is: /usr/local in the sources.
	put_page() {
		sed "$$here" "$$1" >"$$tree/page"
		put 0644 "$$tree/page" "$$2"
	}
	for page in $(PAGES); do
		put_page "$$page" "$$PREFIX/share/man/man$${page##*.}/$${page##*/}"
	done
	for shell in bash zsh; do
		"$$root/bin/python3" -I -m pyqemu_ifctl.completion $$shell >"$$tree/$$shell"
	done
	put 0644 "$$tree/bash" "$$PREFIX/share/bash-completion/completions/pyqemu-ifctl"
	put 0644 "$$tree/zsh" "$${ZSHDIR:-$$PREFIX/share/zsh/site-functions}/_pyqemu-ifctl"
	# NOTE: one word for a shell, then what sed takes for its own.
	bin=$$(printf %s "$$PREFIX/bin" | sed "s/'/'\\\\''/g" | sed 's/[&|\\]/\\&/g')
	sed "s|@bin@|'$$bin'|; s|@version@|$$(sed -n 's/^version = //p' setup.cfg)|" conf/takeover.in >"$$tree/takeover"
	put 0755 "$$tree/takeover" "$$PREFIX/sbin/pyqemu-takeover"
	# NOTE: systemd takes a % for a specifier, sed & and | for its own.
	bin=$$(printf %s "$$PREFIX/bin" | sed 's/%/%%/g; s/[&|\\]/\\&/g')
	for unit in $(UNITS); do
		sed "s|@bin@|$$bin|" "$$unit" >"$$tree/unit"
		put 0644 "$$tree/unit" "$$PREFIX/lib/systemd/system/$${unit##*/}"
	done
	for file in $(SCHEMAS) conf/policy.yaml conf/first.yaml conf/macvtap.conf conf/constraints.txt; do
		put_page "$$file" "$$PREFIX/share/pyqemu-ifup/$${file##*/}"
	done
	for file in $(DOCS); do
		put_page "$$file" "$$PREFIX/share/doc/pyqemu-ifup/$$file"
	done
	# What the pages call conf/ lies there.
	ln -sfn ../../pyqemu-ifup "$$DESTDIR$$PREFIX/share/doc/pyqemu-ifup/conf"
	echo "$$PREFIX/share/doc/pyqemu-ifup/conf" >>"$$root/installed"
	[ ! -e "$$tree/folders" ] || cat "$$tree/folders" >>"$$root/installed"
	# What an earlier version put there and this one does not; the folders that it made stay noted.
	if [ -e "$$root.old/installed" ]; then
		grep -vxF -f "$$root/installed" "$$root.old/installed" | while read -r file; do
			case $$file in
			*/) echo "$$file" >>"$$root/installed" ;;
			*) rm -f "$$DESTDIR$$file" ;;
			esac
		done
	fi
	rm -rf "$$root.old"
	policy=$$DESTDIR/etc/pyqemu-ifup/policy.yaml
	if [ -e "$$policy" ] || [ -L "$$policy" ]; then
		echo "make install: $$policy is there already: left as it is"
	else
		mkdir -p "$${policy%/*}"
		install -m 0644 "$$DESTDIR$$PREFIX/share/pyqemu-ifup/first.yaml" "$$policy"
		echo "make install: a first policy, in $$policy: now make it yours"
	fi

uninstall: ## take away all that install put there, but the policy
	@$(CHECK_PREFIX)
	root=$$DESTDIR$$home
	if [ -z "$$DESTDIR" ] && [ -x "$$PREFIX/sbin/pyqemu-takeover" ]; then
		"$$PREFIX/sbin/pyqemu-takeover" --undo
	fi
	folders=
	if [ -e "$$root/installed" ]; then
		folders=$$(grep '/$$' "$$root/installed" | LC_ALL=C sort -r || true)
		grep -v '/$$' "$$root/installed" | while read -r file; do rm -f "$$DESTDIR$$file"; done
	fi
	rm -rf "$$root" "$$root.new" "$$root.old"
	printf %s "$$folders" | while read -r folder || [ -n "$$folder" ]; do
		[ ! -d "$$DESTDIR$$folder" ] || rmdir --ignore-fail-on-non-empty "$$DESTDIR$$folder"
	done
	if [ -e "$$DESTDIR/etc/pyqemu-ifup" ]; then
		echo "make uninstall: left: $$DESTDIR/etc/pyqemu-ifup"
	fi

deb: ## build a Debian package into OUT (build), for this machine's own python3
	@export LC_ALL=C
	umask 022
	fail() { echo "make $@: $$1" >&2; exit 1; }
	command -v dpkg-deb >/dev/null || fail "no dpkg-deb; this needs Debian, Ubuntu or their kin"
	PYTHON=/usr/bin/python3
	[ -x "$$PYTHON" ] || fail "no $$PYTHON; apt-get install python3"
	# NOTE: the packages lie in a folder of this minor version's, and so does compiled code.
	here=$$("$$PYTHON" -I -c 'import sys; print(f"3.{sys.version_info.minor}")')
	next=3.$$(($${here#3.} + 1))
	version=$$(sed -n 's/^version = //p' setup.cfg)+python$$here
	if [ -z "$${SOURCE_DATE_EPOCH:-}" ]; then
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date -r setup.cfg +%s)
	fi
	export SOURCE_DATE_EPOCH
	root=$$(mktemp -d)
	trap 'rm -rf "$$root"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM
	chmod 0755 "$$root"
	echo "make deb: the programs' own Python packages, from PyPI, for Python $$here: about a minute"
	$(MAKE) --no-print-directory install PREFIX=/usr DESTDIR="$$root" PYTHON="$$PYTHON" \
		ZSHDIR=/usr/share/zsh/vendor-completions >"$$root/log" || { cat "$$root/log"; exit 1; }
	rm -r "$$root/log" "$${root:?}/etc" "$$root/usr/lib/pyqemu-ifup/installed"
	maintainer="$${DEBFULLNAME:-The authors of pyqemu-ifup} <$${DEBEMAIL:-root@localhost}>"
	doc=$$root/usr/share/doc/pyqemu-ifup
	rm "$$doc/LICENSE"
	cp conf/debian/copyright "$$doc/copyright"
	printf '%s\n' "pyqemu-ifup ($$version) unstable; urgency=medium" '' '  * See CHANGELOG.md.' '' \
		" -- $$maintainer  $$(date -uRd "@$$SOURCE_DATE_EPOCH")" >"$$doc/changelog"
	gzip -9n "$$doc/changelog" "$$root"/usr/share/man/man?/*
	arch=all
	if find "$$root" -name '*.so' | grep -q .; then arch=$$(dpkg --print-architecture); fi
	size=$$(du -sk --apparent-size "$$root" | cut -f 1)
	mkdir "$$root/DEBIAN"
	(cd "$$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
	sed "s/@version@/$$version/; s/@arch@/$$arch/; s/@size@/$$size/; s|@maintainer@|$$maintainer|
		s/@depends@/python3 (>= $$here~), python3 (<< $$next~)/" \
		conf/debian/control.in >"$$root/DEBIAN/control"
	for script in postinst prerm postrm; do
		sed "s/@units@/$(notdir $(filter-out %@.service,$(UNITS)))/" "conf/debian/$$script" >"$$root/DEBIAN/$$script"
		chmod 0755 "$$root/DEBIAN/$$script"
	done
	mkdir -p "$$OUT"
	package=$$OUT/pyqemu-ifup_$${version}_$$arch.deb
	dpkg-deb --root-owner-group -Zxz --threads-max=1 --build "$$root" "$$package" >/dev/null
	echo "make deb: $$package"

# Makes ready what the words name below tests/lab. They keep their downloads in the folder of
# PYQEMU_LAB, or below ~/.cache.
# NOTE: what cannot be had (no network, no root) is told here, and the tests that need it skip by
# name; so a step that fails ends nothing.
define MAKE_READY
# shellcheck disable=SC2043
for step in $(1); do
	tests/lab/$$step || echo "make $@: tests/lab/$$step failed; what needs it will say so" >&2
done
$(MAKE) --no-print-directory .venv/ready
endef

.venv/ready: setup.cfg setup.py pyproject.toml
	@fail() { echo "make $@: $$1" >&2; exit 1; }
	$(CHECK_PYTHON)
	"$$PYTHON" -I -m venv .venv
	.venv/bin/python3 -I -m pip install --quiet --no-input -e '.[lint,test]'
	touch $@

test: ## install what is missing and run all the tests (root, or some skip)
	@$(call MAKE_READY,install-packages uml/uml-setup vm/vm-setup guest/guest-setup \
		qemu/qemu-setup chroot/chroot-setup)
	exec .venv/bin/python3 $(if $(PYTEST_ARGS),-m pytest $(PYTEST_ARGS),tests/lab/halves.py)

lint: .venv/ready ## ruff, mypy and codespell
	@.venv/bin/python3 -m ruff check .
	.venv/bin/python3 -m ruff format --check --quiet .
	.venv/bin/python3 -m mypy
	.venv/bin/python3 -m codespell_lib

demo: ## a guest on a bridge by a policy, in a network namespace of its own (root)
	@$(call MAKE_READY,install-packages guest/guest-setup)
	exec .venv/bin/python3 tests/lab/demo.py

bench: ## the cost of one up and one down, beside what people use (root)
	@$(call MAKE_READY,install-packages)
	exec .venv/bin/python3 bench/run

clean: ## take away what the other targets left in this checkout
	@rm -rf .venv build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
