# What a person does with a checkout. `make` alone prints the list.

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON ?= python3
PYTEST_ARGS ?=

HOOKS := pyqemu-ifup pyqemu-ifdown
PROGRAMS := pyqemu-ifctl pyqemu-ifd pyqemu-bridge-helper
ROOMS := $(wildcard conf ifup ifdown ifctl ifd)
PAGES := $(sort $(wildcard $(addsuffix /*.5,$(ROOMS)) $(addsuffix /*.8,$(ROOMS))))
SCHEMAS := $(wildcard conf/*.schema.json)
UNITS := $(wildcard conf/systemd/*)

# NOTE: recipes read these from the environment, quoted, so that no path is ever shell text; and
# no PYTHON* variable of the caller's reaches a Python that root runs.
export PREFIX DESTDIR PYTHON
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONINSPECT PYTHONUSERBASE PYTHONPLATLIBDIR \
	PYTHONPYCACHEPREFIX PYTHONDONTWRITEBYTECODE PYTHONOPTIMIZE PYTHONSAFEPATH PYTHONWARNINGS

.ONESHELL:
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.PHONY: help install uninstall test lint demo bench clean

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
	trap 'rm -rf "$$tree" "$$stage"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' HUP TERM
	rm -rf "$$stage"
	mkdir -p "$${root%/*}"
	echo "make install: the programs' own Python packages, in $$home"
	"$$PYTHON" -I -m venv "$$stage"
	# NOTE: from a copy, since pip leaves build/ in a tree, and takes what lies in build/ along.
	cp -R setup.cfg setup.py pyproject.toml LICENSE $(wildcard README.md) $(ROOMS) "$$tree"
	"$$stage/bin/python3" -I -m pip install --quiet --no-input --no-compile "$$tree"
	"$$stage/bin/python3" -I -m pip check --quiet
	"$$stage/bin/python3" -I -m pip uninstall --quiet --quiet --yes wheel setuptools pip
	# NOTE: what names the place of the build, and nothing at run time reads.
	find "$$stage/bin" ! -type d ! -name 'python*' -delete
	find "$$stage/lib" -name direct_url.json -delete
	sed -i '/^command *=/d' "$$stage/pyvenv.cfg"
	"$$stage/bin/python3" -I -m compileall -qq -f --invalidation-mode timestamp \
		-s "$$stage" -p "$$home" "$$stage/lib" ||
		fail "$$stage/lib: does not compile"
	if grep -rqF "$$stage" "$$stage"; then fail "$$stage: names itself; $$root left as it was"; fi
	: >"$$stage/installed"
	echo "make install: the programs, in $$PREFIX/bin"
	put() {
		mkdir -p "$$DESTDIR$${3%/*}"
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
	for page in $(PAGES); do
		put 0644 "$$page" "$$PREFIX/share/man/man$${page##*.}/$${page##*/}"
	done
	# NOTE: systemd takes a % for a specifier, sed & and | for its own.
	bin=$$(printf %s "$$PREFIX/bin" | sed 's/%/%%/g; s/[&|\\]/\\&/g')
	for unit in $(UNITS); do
		sed "s|@bin@|$$bin|" "$$unit" >"$$tree/unit"
		put 0644 "$$tree/unit" "$$PREFIX/lib/systemd/system/$${unit##*/}"
	done
	for file in $(SCHEMAS) conf/policy.yaml; do
		put 0644 "$$file" "$$PREFIX/share/pyqemu-ifup/$${file##*/}"
	done
	# What an earlier version put there and this one does not.
	if [ -e "$$root.old/installed" ]; then
		grep -vxF -f "$$root/installed" "$$root.old/installed" | while read -r file; do
			rm -f "$$DESTDIR$$file"
		done
	fi
	rm -rf "$$root.old"
	policy=$$DESTDIR/etc/pyqemu-ifup/policy.yaml
	if [ -e "$$policy" ] || [ -L "$$policy" ]; then
		echo "make install: $$policy is there already: left as it is"
	else
		mkdir -p "$${policy%/*}"
		install -m 0644 conf/policy.yaml "$$policy"
		echo "make install: the sample policy, in $$policy: now make it yours"
	fi

uninstall: ## take away all that install put there, but the policy
	@$(CHECK_PREFIX)
	root=$$DESTDIR$$home
	if [ -e "$$root/installed" ]; then
		while read -r file; do rm -f "$$DESTDIR$$file"; done <"$$root/installed"
	fi
	rm -rf "$$root" "$$root.new" "$$root.old"
	if [ -d "$$DESTDIR$$PREFIX/share/pyqemu-ifup" ]; then
		rmdir --ignore-fail-on-non-empty "$$DESTDIR$$PREFIX/share/pyqemu-ifup"
	fi
	if [ -e "$$DESTDIR/etc/pyqemu-ifup" ]; then
		echo "make uninstall: left: $$DESTDIR/etc/pyqemu-ifup"
	fi

# Makes ready what the words name below tests/lab. They keep their downloads in the folder of
# PYQEMU_LAB, or below ~/.cache.
# NOTE: what cannot be had (no network, no root) is told here, and the tests that need it skip by
# name; so a step that fails ends nothing.
define MAKE_READY
for step in $(1); do
	tests/lab/$$step || echo "make $@: tests/lab/$$step failed; what needs it will say so" >&2
done
$(MAKE) --no-print-directory .venv/ready
endef

.venv/ready: setup.cfg setup.py pyproject.toml
	@fail() { echo "make $@: $$1" >&2; exit 1; }
	$(CHECK_PYTHON)
	"$$PYTHON" -I -m venv .venv
	.venv/bin/python3 -I -m pip install --quiet --no-input -e '.[test]'
	touch $@

test: ## install what is missing and run all the tests (root, or some skip)
	@$(call MAKE_READY,install-packages uml/uml-setup guest/guest-setup qemu/qemu-setup)
	exec .venv/bin/python3 -m pytest $(PYTEST_ARGS)

lint: .venv/ready ## ruff and mypy
	@.venv/bin/python3 -m ruff check .
	.venv/bin/python3 -m mypy

demo: ## a guest on a bridge by a policy, in a network namespace of its own (root)
	@$(call MAKE_READY,install-packages guest/guest-setup)
	exec .venv/bin/python3 tests/lab/demo.py

bench: ## the cost of one up and one down, beside what people use (root)
	@$(call MAKE_READY,install-packages)
	exec .venv/bin/python3 bench/run

clean: ## take away what the other targets left in this checkout
	@rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
